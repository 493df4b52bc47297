#ifndef HB_SIMDE_MISSING_H
#define HB_SIMDE_MISSING_H

#endif
