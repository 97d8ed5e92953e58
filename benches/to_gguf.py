"""A Qwen2 checkpoint (safetensors, bfloat16) as GGUF with the same 16-bit weights, for timing llama.cpp on it.

usage: to_gguf.py MODEL_DIR OUT.gguf      (gguf, numpy)

It has no vocabulary: llama-bench and llama-batched-bench run on token ids.
"""
import json
import pathlib
import sys

import gguf
import numpy

folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
config = json.loads((folder / "config.json").read_text())
if config["model_type"] != "qwen2":
    sys.exit("to_gguf.py: only Qwen2's tensors are named here")
rope = config.get("rope_parameters") or config
heads = config["num_attention_heads"]

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{IN_LAYER[part]}.{kind}"


def tensors():
    for file in sorted(folder.glob("*.safetensors")):
        data = numpy.memmap(file, numpy.uint8, "r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, t in header.items():
            if name == "__metadata__" or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
                continue
            if t["dtype"] != "BF16":
                sys.exit(f"to_gguf.py: {name} is {t['dtype']}, not BF16")
            a, b = t["data_offsets"]
            yield gguf_name(name), data[8 + size + a : 8 + size + b], t["shape"]


w = gguf.GGUFWriter(out, "qwen2")
w.add_block_count(config["num_hidden_layers"])
w.add_context_length(config["max_position_embeddings"])
w.add_embedding_length(config["hidden_size"])
w.add_feed_forward_length(config["intermediate_size"])
w.add_head_count(heads)
w.add_head_count_kv(config["num_key_value_heads"])
w.add_layer_norm_rms_eps(config["rms_norm_eps"])
w.add_rope_freq_base(rope["rope_theta"])
w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
w.add_tokenizer_model("none")
w.add_vocab_size(config["vocab_size"])
for name, raw, shape in tensors():
    if len(shape) == 1:  # norms and biases: llama.cpp wants float32
        w.add_tensor(name, (raw.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32))
    else:
        w.add_tensor(name, raw.reshape(shape[0], shape[1] * 2), raw_dtype=gguf.GGMLQuantizationType.BF16)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
