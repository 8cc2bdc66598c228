"""A small T5 with its tokenizer, as the released models ship them. It needs no diffusers."""

import io
import json
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

SENTENCES = [
    "a panda plays the guitar in a bamboo forest",
    "rain falls on quiet green leaves while the panda plays",
]
EXTRA_IDS = 100  # tokens after those of spiece.model, in every T5


def write_tokenizer(folder):
    """The files of a released tokenizer/: spiece.model, and no tokenizer.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        pad_piece="<pad>",
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
    extra = [f"<extra_id_{number}>" for number in range(EXTRA_IDS)]
    special = {
        "additional_special_tokens": extra,
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    files = {
        "tokenizer_config.json": {
            **special,
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": EXTRA_IDS,
            "legacy": True,
            "model_max_length": 226,
            "sp_model_kwargs": {},
        },
        "special_tokens_map.json": special,
        "added_tokens.json": {
            token: pieces + EXTRA_IDS - 1 - number for number, token in enumerate(extra)
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values), encoding="utf-8")


def random_t5(dim, vocabulary):
    """A T5EncoderModel of two layers."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.3,  # to be off
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return T5EncoderModel(config)


def write_text_encoder(folder, dim):
    """`folder/tokenizer` and, in bfloat16 and several files, `folder/text_encoder`."""
    folder = Path(folder)
    write_tokenizer(folder / "tokenizer")
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    model = random_t5(dim, vocabulary).to(torch.bfloat16)
    model.save_pretrained(folder / "text_encoder", max_shard_size="8KB")
