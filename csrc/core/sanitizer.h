// Whether the compiler adds the checks of AddressSanitizer: 1 or 0.
#ifndef HB_CORE_SANITIZER_H
#define HB_CORE_SANITIZER_H

#if defined(__SANITIZE_ADDRESS__) // gcc
#define HB_ADDRESS_SANITIZER 1
#elif defined(__has_feature) // clang
#if __has_feature(address_sanitizer)
#define HB_ADDRESS_SANITIZER 1
#endif
#endif
#if !defined(HB_ADDRESS_SANITIZER)
#define HB_ADDRESS_SANITIZER 0
#endif

#endif
