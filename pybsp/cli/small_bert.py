"""A small BERT with its own word pieces, for when no pretrained model is at hand."""

from __future__ import annotations

from typing import Any

from .tasks import Split

VOCABULARY = 4096
POSITIONS = 128


def train_tokenizer(split: Split, vocabulary: int = VOCABULARY) -> Any:
    """A lower-casing word-piece tokenizer learned from the texts of ``split``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import WordPieceTrainer
    from transformers import PreTrainedTokenizerFast

    special = {
        "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]",
        "sep_token": "[SEP]", "mask_token": "[MASK]",
    }  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special.values()),
        show_progress=False,
    )
    texts = (text for texts in split.texts for text in texts)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[
            (name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")
        ],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=POSITIONS, **special
    )


def build(tokenizer: Any, outputs: int, *, hidden: int, layers: int, seed: int) -> Any:
    """A randomly initialised BERT classifier of ``layers`` x ``hidden``."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=4 * hidden,
            max_position_embeddings=POSITIONS,
            num_labels=outputs,  # type: ignore[call-arg]
            pad_token_id=tokenizer.pad_token_id,
        )
    )
