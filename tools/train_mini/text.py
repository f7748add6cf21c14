"""The mini text encoder: a UMT5 encoder of the real architecture and a Unigram tokenizer over the captions' words.

Words outside the captions fall back to letters, so any English prompt tokenizes; only the captions' words mean something.
"""

from __future__ import annotations

import string

from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from mxdit_models.digits import BACKGROUNDS, COLORS, DIGITS, DIRECTIONS, SPEEDS

TEXT_DIM = 128


def build_tokenizer() -> T5Tokenizer:
    words = sorted({"a", "moving", "on", "background", *DIGITS, *COLORS, *DIRECTIONS, *SPEEDS, *BACKGROUNDS})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    letters = string.ascii_lowercase + string.digits + ".,!?'-"
    vocab = special + [(f"▁{word}", -3.0) for word in words] + [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            is_gated_act=True,
            dense_act_fn="gelu_new",
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            tie_word_embeddings=False,
        )
    )
