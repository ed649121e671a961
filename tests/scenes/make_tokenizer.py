"""Makes lumos_jax/scenes/tokenizer, the word-level tokenizer of scene captions.

    python tests/scenes/make_tokenizer.py

It stands here because `encoders` must not import `data`; a test makes it again and compares, so that the two never drift apart.
Ids: 0 padding, 1 end of text, 2 unknown, then the words in alphabetical order. Text is lower-cased and split at spaces and
punctuation.
"""

from __future__ import annotations

import pathlib
import sys

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "lumos_jax" / "scenes" / "tokenizer"
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
SCENES = 5000  # every word that captions can have occurs many times in as many scenes


def build(scenes: int = SCENES):
    """A transformers tokenizer that knows every word of the captions of scenes 0 .. scenes - 1."""
    from transformers import PreTrainedTokenizerFast

    from lumos_jax.scenes.scene import captions, make_scene

    tokenizer = Tokenizer(models.WordLevel({PAD: 0, EOS: 1, UNKNOWN: 2}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    words = set()
    for index in range(scenes):
        for caption in captions(make_scene(index)):
            text = tokenizer.normalizer.normalize_str(caption)
            words.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    vocabulary = {word: i for i, word in enumerate([PAD, EOS, UNKNOWN, *sorted(words)])}
    tokenizer.model = models.WordLevel(vocabulary, unk_token=UNKNOWN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    build().save_pretrained(FOLDER)
    print(f"{FOLDER}: {', '.join(sorted(path.name for path in FOLDER.iterdir()))}")
