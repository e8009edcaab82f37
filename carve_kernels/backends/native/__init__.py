"""What the backends of the compiled extension share: the library, the schemas of its operators, buffers of regions."""
