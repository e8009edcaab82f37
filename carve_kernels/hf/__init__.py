"""transformers: sessions, layouts, prompts, loading, the engine."""
