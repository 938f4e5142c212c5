// One binary serves old and new processors: a loop that is marked is compiled for each of these, and the right one is
// chosen when the library is loaded. Contraction of a * b + c is off in the build, so that all give the same bits.
// Templates cannot be marked: a plain function calls an inlined one.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(HVD_TRAIN_NO_CLONES)
#define HVD_TRAIN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HVD_TRAIN_CLONES
#endif

#define HVD_TRAIN_INLINE inline __attribute__((always_inline))
