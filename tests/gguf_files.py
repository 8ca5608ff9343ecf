"""GGUF files of tiny Llamas, as llama.cpp's converter writes them."""

import make
from safetensors.torch import load_file

from lib import files

WORDS = sorted(make.tokenizer().get_vocab(), key=make.tokenizer().get_vocab().get)


def to_gguf(folder, path, tokens):
    """Write a Llama of ours as a GGUF file, float32, as llama.cpp's converter does: the rows of q
    and k lie in another order there."""
    import gguf

    config, weights = (
        files.read_json(folder / "config.json"),
        load_file(folder / "model.safetensors"),
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in weights.items():
        for heads, part in (
            (config["num_attention_heads"], "q_proj"),
            (config["num_key_value_heads"], "k_proj"),
        ):
            if part in name:
                tensor = (
                    tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
                )
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
