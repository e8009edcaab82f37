"""What several backends share: the compiled library, schemas of its operators, scratch, buffers, limits of kernels."""
