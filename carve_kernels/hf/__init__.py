"""CARVE on transformers models: a reading map, in the order of the flow. A part imports only parts above it here.

1. Model access. `loading` finds a checkpoint and loads it, `processors` its processor. `model` finds the decoder, the
   layers and the devices of a model, and foreign code in its forward. `names` and `caches` spell the private names of
   transformers. `inputs` opens images, builds prompts, and runs each image through the processor and the vision tower
   once. `query_rows` finds the captured rows of a prompt by its `prompt_text` and the processor's `chat_templates`.
   `attention_patch` wraps attention functions and captures layers that are alike in one call; `head_shares` averages
   captures over the processes of a tensor-parallel model.
2. `layouts`: where visual tokens are and which part of an image each covers. A module per kind of layout;
   `letterbox` pads images that a processor would crop.
3. `session`: `capture_attention`. `session` installs the hooks, `forward_tracker` decides to which prompt a forward
   belongs (`cache_tracker`: by its KV cache; `generate_guard`: inside `generate`), `attention_masks` reads its mask,
   `recording` stores its captures, `merging` joins those of several devices. `contract` checks an untested
   transformers.
4. `decoding`: one door to greedy decoding with captured rows. It decides between tree decoding (many prompts in one
   batch over a shared prefix cache) and the sequential fallback (one `generate` per prompt).
5. `engine`: `CarveEngine`. `passes` has a job from its request through the first pass, the carving and the second pass
   to its `result`; `cache` stores general maps and prefix caches by a `fingerprint` of the model; `batching` answers
   many questions.
6. `profile`: finds the layers and rows of a model whose maps react to the question.
"""
