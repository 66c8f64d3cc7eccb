"""Tiny models of many families, built offline: what vembed and others train.

Sizes are as small as each family allows. No model here is downloaded; timm is not installed, so its backbones are not among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**TEXT, "num_key_value_heads": 1}
WIDE = {**GROUPED, "head_dim": 8}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
QWEN2_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 8}
QWEN3_VISION = {
    "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "patch_size": 8, "out_hidden_size": 16,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WAVE = {
    **TEXT, "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
}  # fmt: skip


def whisper() -> Any:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    positions = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8}
    sizes = {key: value for key, value in BART.items() if key != "max_position_embeddings"}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **tokens, **positions))


def paligemma() -> Any:
    return hf.PaliGemmaConfig(
        text_config={**WIDE, "model_type": "gemma"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 16},
        projection_dim=16,
    )


ENCODERS: dict[str, Callable[[], Any]] = {
    "Bert": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
    "Bert for masks, tied": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "RoBERTa": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT)),
    "XLM-R for masks, tied": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**TEXT)),
    "CamemBERT": lambda: hf.CamembertModel(hf.CamembertConfig(**TEXT)),
    "DistilBert": lambda: hf.DistilBertModel(
        hf.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    ),
    "ELECTRA": lambda: hf.ElectraModel(hf.ElectraConfig(**TEXT, embedding_size=8)),
    "DeBERTa": lambda: hf.DebertaModel(hf.DebertaConfig(**TEXT)),
    "DeBERTa-v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**TEXT)),
    "ModernBERT for masks, tied": lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig(**TEXT, pad_token_id=0)),
    "MPNet": lambda: hf.MPNetModel(hf.MPNetConfig(**TEXT)),
    "ALBERT": lambda: hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=8)),
    "Nomic": lambda: hf.NomicBertModel(hf.NomicBertConfig(**TEXT)),
    "Jina-v3": lambda: hf.JinaEmbeddingsV3Model(hf.JinaEmbeddingsV3Config(**TEXT)),
    "GTE": lambda: hf.GteModel(hf.GteConfig(**TEXT)),
    "BigBird": lambda: hf.BigBirdModel(hf.BigBirdConfig(**TEXT)),
    "Longformer": lambda: hf.LongformerModel(hf.LongformerConfig(**TEXT, attention_window=4)),
    "XLNet": lambda: hf.XLNetModel(hf.XLNetConfig(vocab_size=40, d_model=16, n_layer=1, n_head=2, d_inner=24)),
    "DPR": lambda: hf.DPRQuestionEncoder(hf.DPRConfig(**TEXT, projection_dim=8)),
    "EuroBERT": lambda: hf.EuroBertModel(hf.EuroBertConfig(**GROUPED, pad_token_id=0)),
}

DECODERS: dict[str, Callable[[], Any]] = {
    "GPT2, tied": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "Qwen3, tied": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE, tie_word_embeddings=True)),
    "Qwen3, base": lambda: hf.Qwen3Model(hf.Qwen3Config(**WIDE)),
    "Gemma, tied": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**WIDE)),
    "Gemma2, tied": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE)),
    "Gemma3, tied": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE)),
    "Phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED, pad_token_id=0)),
    "OLMo2": lambda: hf.Olmo2ForCausalLM(hf.Olmo2Config(**GROUPED, pad_token_id=0)),
    "SmolLM3, tied": lambda: hf.SmolLM3ForCausalLM(hf.SmolLM3Config(**GROUPED, pad_token_id=0)),
    "OPT, tied": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24)
    ),
    "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)),
    "Falcon, tied": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ),
    "Bloom, tied": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)),
    "Gemma3n, tied": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **WIDE,
            vocab_size_per_layer_input=40,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0, 0.0],
            altup_num_inputs=2,
        )
    ),
    "Gemma4, tied": lambda: hf.Gemma4ForCausalLM(
        hf.Gemma4TextConfig(
            **WIDE, vocab_size_per_layer_input=40, hidden_size_per_layer_input=8, num_kv_shared_layers=0
        )
    ),
    "EmbeddingGemma": lambda: hf.Gemma3TextModel(hf.Gemma3TextConfig(**WIDE, use_bidirectional_attention=True)),
    "Cohere2, tied": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**GROUPED, pad_token_id=0)),
    "StableLM": lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)),
    "MPT, tied": lambda: hf.MptForCausalLM(
        hf.MptConfig(vocab_size=40, d_model=16, n_layers=1, n_heads=2, expansion_ratio=2)
    ),
    "GPT-J": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(vocab_size=40, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)),
    "StarCoder2, tied": lambda: hf.Starcoder2ForCausalLM(hf.Starcoder2Config(**GROUPED)),
}

ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "T5, tied": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "T5's encoder, tied": lambda: hf.T5EncoderModel(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    ),
    "BART, tied": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "mBART, tied": lambda: hf.MBartForConditionalGeneration(hf.MBartConfig(**BART)),
    "Marian, tied": lambda: hf.MarianMTModel(hf.MarianConfig(**BART, pad_token_id=0)),
    "Pegasus, tied": lambda: hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART)),
    "Whisper, tied": whisper,
    "M2M100, tied": lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**BART)),
    "LED, tied": lambda: hf.LEDForConditionalGeneration(
        hf.LEDConfig(
            **{key: value for key, value in BART.items() if key != "max_position_embeddings"},
            max_encoder_position_embeddings=32,
            max_decoder_position_embeddings=32,
            attention_window=4,
        )
    ),
    "Two Berts, tied": lambda: hf.EncoderDecoderModel(
        hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), hf.BertConfig(**TEXT))
    ),
    "ViT and GPT2, tied": lambda: hf.VisionEncoderDecoderModel(
        hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            hf.ViTConfig(**VISION), hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        )
    ),
}

VISIONS: dict[str, Callable[[], Any]] = {
    "ViT": lambda: hf.ViTModel(hf.ViTConfig(**VISION)),
    "DeiT": lambda: hf.DeiTModel(hf.DeiTConfig(**VISION)),
    "BEiT": lambda: hf.BeitModel(hf.BeitConfig(**VISION, use_relative_position_bias=True)),
    "DINOv2": lambda: hf.Dinov2Model(
        hf.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    ),
    "DINOv3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VISION)),
    "Swin": lambda: hf.SwinModel(
        hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    ),
    "ConvNeXt": lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
    "ResNet": lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "DINOv2 with registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
        )
    ),
    "SwinV2": lambda: hf.Swinv2Model(
        hf.Swinv2Config(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    ),
    "ViT-MAE": lambda: hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(
            **VISION,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
            decoder_num_hidden_layers=1,
            decoder_intermediate_size=24,
        )
    ),
    "VideoMAE": lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**VISION, num_frames=2)),
    "SegFormer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[3, 3],
            strides=[2, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=8,
        )
    ),
    "MobileViT": lambda: hf.MobileViTModel(
        hf.MobileViTConfig(
            image_size=32, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[4, 4, 4, 8, 8, 8, 16], num_attention_heads=2
        )
    ),
    "Pixtral": lambda: hf.PixtralVisionModel(hf.PixtralVisionConfig(**VISION)),
    "SAM, tied": lambda: hf.SamModel(
        hf.SamConfig(
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
                "output_channels": 8,
                "window_size": 2,
                "global_attn_indexes": [0],
                "mlp_dim": 24,
                "num_pos_feats": 4,
            },
            prompt_encoder_config={"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            mask_decoder_config={
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "mlp_dim": 16,
                "iou_head_hidden_dim": 8,
            },
        )
    ),
}

MULTIMODAL: dict[str, Callable[[], Any]] = {
    "CLIP": lambda: hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "CLIP, text": lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)),
    "SigLIP": lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VISION)),
    "SigLIP2": lambda: hf.Siglip2Model(
        hf.Siglip2Config(
            text_config={**TEXT, "projection_size": 16},
            vision_config={key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 4},
        )
    ),
    "ChineseCLIP": lambda: hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)
    ),
    "ALIGN": lambda: hf.AlignModel(
        hf.AlignConfig(
            text_config=TEXT,
            vision_config={
                "image_size": 16,
                "width_coefficient": 0.25,
                "depth_coefficient": 0.2,
                "hidden_dim": 16,
                "depthwise_padding": [],
                "in_channels": [8, 8],
                "out_channels": [8, 8],
                "kernel_sizes": [3, 3],
                "strides": [1, 2],
                "num_block_repeats": [1, 1],
                "expand_ratios": [1, 2],
            },
            projection_dim=16,
        )
    ),
    "BLIP, tied": lambda: hf.BlipForConditionalGeneration(
        hf.BlipConfig(text_config={**TEXT, "encoder_hidden_size": 16}, vision_config=VISION, projection_dim=8)
    ),
    "LLaVA, renamed": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION))
    ),
    "Qwen2-VL": lambda: hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config={**GROUPED, "rope_parameters": ROPE}, vision_config=QWEN2_VISION)
    ),
    "Qwen2.5-VL": lambda: hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            text_config={**GROUPED, "rope_parameters": ROPE},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 24,
                "patch_size": 8,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
            },
        )
    ),
    "Qwen3-VL": lambda: hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(text_config=WIDE, vision_config=QWEN3_VISION)
    ),
    "Qwen3-VL, base": lambda: hf.Qwen3VLModel(hf.Qwen3VLConfig(text_config=WIDE, vision_config=QWEN3_VISION)),
    "PaliGemma, tied": lambda: hf.PaliGemmaForConditionalGeneration(paligemma()),
    "Gemma3 with images, tied": lambda: hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=WIDE, vision_config=VISION, mm_tokens_per_image=4)
    ),
    "InternVL, tied": lambda: hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            text_config={**GROUPED, "model_type": "qwen2"},
            vision_config={**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
        )
    ),
    "Two towers": lambda: hf.VisionTextDualEncoderModel(
        hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(**VISION), hf.BertConfig(**TEXT))
    ),
    "CLIPSeg": lambda: hf.CLIPSegModel(hf.CLIPSegConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "OWLv2": lambda: hf.Owlv2Model(hf.Owlv2Config(text_config=TEXT, vision_config=VISION, projection_dim=8)),
    "GroupViT": lambda: hf.GroupViTModel(
        hf.GroupViTConfig(
            text_config=TEXT,
            projection_dim=8,
            projection_intermediate_dim=16,
            vision_config={
                "image_size": 16,
                "patch_size": 4,
                "hidden_size": 16,
                "num_attention_heads": 2,
                "intermediate_size": 24,
                "depths": [1, 1],
                "num_group_tokens": [4, 0],
                "num_output_groups": [4, 2],
            },
        )
    ),
    "LayoutLMv3": lambda: hf.LayoutLMv3Model(
        hf.LayoutLMv3Config(
            **TEXT, coordinate_size=2, shape_size=4, max_2d_position_embeddings=16, input_size=16, patch_size=8
        )
    ),
    "BLIP-2, tied": lambda: hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            vision_config=VISION,
            qformer_config={**TEXT, "encoder_hidden_size": 16},
            num_query_tokens=2,
            text_config={
                "model_type": "opt",
                "vocab_size": 40,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 24,
                "word_embed_proj_dim": 16,
            },
        )
    ),
    "SmolVLM": lambda: hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            text_config={**GROUPED, "model_type": "llama", "pad_token_id": 0}, vision_config=VISION, scale_factor=2
        )
    ),
    "ColPali": lambda: hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=paligemma(), embedding_dim=8)),
    "ColQwen2": lambda: hf.ColQwen2ForRetrieval(
        hf.ColQwen2Config(
            vlm_config=hf.Qwen2VLConfig(text_config={**GROUPED, "rope_parameters": ROPE}, vision_config=QWEN2_VISION),
            embedding_dim=8,
        )
    ),
    "ModernVBERT": lambda: hf.ModernVBertModel(
        hf.ModernVBertConfig(text_config={**TEXT, "pad_token_id": 0}, vision_config=VISION)
    ),
    "LLaVA-NeXT, renamed": lambda: hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            text_config=hf.LlamaConfig(**TEXT),
            vision_config=hf.CLIPVisionConfig(**VISION),
            image_grid_pinpoints=[[16, 16]],
        )
    ),
    "Mistral3, tied": lambda: hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            text_config={**GROUPED, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral"}
        )
    ),
    "Qwen3.5": lambda: hf.Qwen3_5ForConditionalGeneration(
        hf.Qwen3_5Config(
            text_config={**WIDE, **LINEAR},
            vision_config={key: value for key, value in QWEN3_VISION.items() if key != "deepstack_visual_indexes"},
        )
    ),
    "Florence2, tied": lambda: hf.Florence2ForConditionalGeneration(
        hf.Florence2Config(
            text_config={**BART, "model_type": "bart"},
            vision_config={
                "embed_dim": [8],
                "num_heads": [2],
                "num_groups": [2],
                "depths": [1],
                "patch_size": [7],
                "patch_stride": [4],
                "patch_padding": [3],
                "patch_prenorm": [False],
                "window_size": 4,
                "projection_dim": 16,
                "max_position_embeddings": 10,
                "max_temporal_embeddings": 2,
            },
        )
    ),
}

AUDIO: dict[str, Callable[[], Any]] = {
    "Wav2Vec2": lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)),
    "HuBERT": lambda: hf.HubertModel(hf.HubertConfig(**WAVE)),
    "WavLM": lambda: hf.WavLMModel(hf.WavLMConfig(**WAVE)),
    "AST": lambda: hf.ASTModel(
        hf.ASTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            patch_size=8,
            max_length=16,
            num_mel_bins=16,
        )
    ),
    "CLAP": lambda: hf.ClapModel(
        hf.ClapConfig(
            text_config={**TEXT, "projection_dim": 8},
            projection_dim=8,
            audio_config={
                "spec_size": 16,
                "window_size": 4,
                "patch_size": 2,
                "patch_stride": 2,
                "num_mel_bins": 16,
                "patch_embeds_hidden_size": 8,
                "hidden_size": 16,
                "depths": [1, 1],
                "num_attention_heads": [1, 2],
                "projection_dim": 8,
            },
        )
    ),
}

EXPERT_MODELS: dict[str, Callable[[], Any]] = {
    "Mixtral, parts": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "Qwen2-MoE, parts": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=12)
    ),
    "Qwen3-MoE, parts": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**WIDE, **EXPERTS)),
    "Qwen3-VL-MoE": lambda: hf.Qwen3VLMoeForConditionalGeneration(
        hf.Qwen3VLMoeConfig(text_config={**WIDE, **EXPERTS}, vision_config=QWEN3_VISION)
    ),
    "OLMoE, parts": lambda: hf.OlmoeForCausalLM(
        hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    ),
    "DeepSeek-V3, parts": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(
            **TEXT,
            num_key_value_heads=2,
            moe_intermediate_size=12,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=4,
            first_k_dense_replace=1,
        )
    ),
    "GPT-OSS": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**WIDE, num_local_experts=4, pad_token_id=0)),
    "Switch, tied": lambda: hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            num_experts=4,
            num_sparse_encoder_layers=1,
        )
    ),
    "Llama4": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**WIDE, intermediate_size_mlp=24, num_local_experts=4)),
    "PhiMoE, parts": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**GROUPED, num_local_experts=4)),
    "GLM4-MoE, parts": lambda: hf.Glm4MoeForCausalLM(
        hf.Glm4MoeConfig(
            **WIDE, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1
        )
    ),
    "Granite-MoE": lambda: hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**GROUPED, num_local_experts=4)),
    "Qwen3-Next, parts": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(**WIDE, **EXPERTS, **LINEAR, shared_expert_intermediate_size=12)
    ),
}

STATE_SPACE: dict[str, Callable[[], Any]] = {
    "Mamba, tied": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "Mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8, n_groups=1
        )
    ),
    "RWKV": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
    ),
    "Jamba, parts": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **GROUPED,
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    ),
    "LFM2, tied": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    ),
    "RecurrentGemma, tied": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**{**GROUPED, "num_hidden_layers": 3}, lru_width=16)
    ),
}

ARCHITECTURES = {
    **ENCODERS, **DECODERS, **ENCODER_DECODERS, **VISIONS, **MULTIMODAL, **AUDIO, **EXPERT_MODELS, **STATE_SPACE,
}  # fmt: skip


def build(name: str, seed: int = 11) -> Any:
    """A model of the family, with the weights of `seed`."""
    torch.manual_seed(seed)
    return ARCHITECTURES[name]().eval()
