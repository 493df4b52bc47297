#include "core/crowd.h"

#include <stdbool.h>

// Threads added or left out at a time.
static int step(int threads)
{
    return threads < 16 ? 1 : threads / 8;
}

int hb_crowd_threads(hb_crowd *crowd, int threads, int64_t now_ns)
{
    if (crowd->spared > 0 && now_ns >= crowd->until_ns) {
        crowd->spared -= step(threads);
        if (crowd->spared < 0) crowd->spared = 0;
        crowd->tried_ns = now_ns;
        crowd->until_ns = crowd->spared > 0 ? now_ns + HB_CROWD_TRIAL_NS : 0;
        crowd->debt = 0;
    }
    return crowd->spared < threads ? threads - crowd->spared : 1;
}

void hb_crowd_judge(hb_crowd *crowd, int threads, int64_t now_ns, int64_t late_ns, int64_t gain_ns)
{
    const bool suffers = crowd->spared == 0 && now_ns < crowd->until_ns;
    crowd->debt += late_ns - (suffers ? gain_ns * HB_CROWD_SUFFER_TIMES : gain_ns / HB_CROWD_SHARE);
    if (crowd->debt < 0) crowd->debt = 0;
    if (late_ns == 0) return;
    const int64_t since = now_ns - crowd->tried_ns;
    const int64_t limit = crowd->tried_ns != 0 && since < HB_CROWD_TRIAL_NS ? HB_CROWD_TRIAL_DEBT_NS
                                                                            : HB_CROWD_DEBT_NS;
    if (crowd->debt < limit) return;
    if (suffers) crowd->refuse_ns = now_ns + HB_CROWD_REFUSE_NS;
    crowd->debt = 0;
    crowd->spared += step(threads);
    if (crowd->spared >= threads) crowd->spared = threads - 1;
    if (crowd->tried_ns == 0 || since >= HB_CROWD_SOON_NS) crowd->doublings = 0;
    crowd->left_ns = now_ns;
    crowd->until_ns = now_ns + ((int64_t)HB_CROWD_REST_NS << crowd->doublings);
    if (crowd->doublings < HB_CROWD_DOUBLINGS) crowd->doublings++;
}

void hb_crowd_suffer(hb_crowd *crowd, int64_t now_ns)
{
    if (now_ns < crowd->refuse_ns) return;
    crowd->spared = 0;
    crowd->debt = 0;
    crowd->until_ns = now_ns + HB_CROWD_SUFFER_NS;
}
