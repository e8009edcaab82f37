"""What several backends share: the compiled library, its operators' schemas, buffers of regions, limits of kernels."""
