"""`halfbyte bench`: how fast everything is on this machine, beside what else is installed and what the machine can do.

turns        measuring in turns, on a machine whose speed changes
contests     who takes part in what: our kernels, torch, bitsandbytes, ggml, NumPy, the rulers; needs torch
compare      contests in processes of their own, one for each number of threads; the table
ggml         llama.cpp's kernels as a competitor
chart        pictures
environment  what a number needs beside it
"""
