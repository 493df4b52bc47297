// The orders of the float64 sums that CPU and GPU must find alike, to the bit.
//
// Terms go to a number of lanes, to each in ascending order from 0, and the lanes are folded in
// halves: lane l += lane l + half, half = lanes / 2 .. 1. Lanes are what vectors and threads are.
#ifndef HB_CORE_SUMS_H
#define HB_CORE_SUMS_H

enum {
    // The mean of a tensor's 4-bit scales: inside a chunk, scale i goes to lane i % MEAN_LANES; the
    // sum of chunk c goes to lane c % SUM_LANES.
    HB_MEAN_CHUNK = 2048,
    HB_MEAN_LANES = 32,
    // Norms of an optimizer's tensors: inside a piece, element i goes to lane i % SUM_LANES; the
    // sum of piece c of the tensor goes to lane c % SUM_LANES.
    HB_OPTIM_PIECE = 2048,
    HB_SUM_LANES = 256
};

// Destroys sum [lanes]; lanes is a power of two.
static inline double hb_fold(double *sum, int lanes)
{
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int l = 0; l < half; l++) sum[l] += sum[l + half];
    return sum[0];
}

#endif
