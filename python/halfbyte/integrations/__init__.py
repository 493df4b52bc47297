"""halfbyte inside other libraries; each module is imported by whoever uses that library."""
