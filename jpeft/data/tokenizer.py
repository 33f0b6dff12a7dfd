"""The tokenizer of a base model, refused where it would turn text into tokens that the model does not know."""

from pathlib import Path
from typing import Any

from jpeft.core.errors import UserError, one_line

__all__ = ["load"]


def load(folder: Path, vocab_size: int, words: bool = False) -> Any:
    """Loads the Hugging Face tokenizer in a model's folder.

    Args:
      folder: of the base model.
      vocab_size: rows of the model's word embedding.
      words: whether it has to say which token is of which word.

    Raises:
      UserError: if the folder holds no vocabulary (`transformers` then makes an empty tokenizer, to which every word is
        unknown), one that cannot be read, or one with ids beyond the embedding.
    """
    from transformers import AutoTokenizer

    try:
        # RoBERTa's tells words apart by the space before them.
        tokenizer = AutoTokenizer.from_pretrained(folder, **({"add_prefix_space": True} if words else {}))
    except Exception as error:  # whatever its parsers raise, of JSON, of Rust, of a missing class
        reason = one_line(error)
        if "Validation error for field" in reason:  # transformers reads it on the way to the tokenizer
            raise UserError(f"transformers cannot read {folder / 'config.json'}: {reason:.160}") from None
        raise UserError(
            f"cannot read the tokenizer in {folder}: expected the base model's tokenizer.json or vocabulary "
            f"({reason:.120})"
        ) from None
    files = sorted(set(tokenizer.vocab_files_names.values()))
    if not any((folder / name).is_file() for name in files):
        raise UserError(
            f"{folder} holds no vocabulary: expected {' or '.join(files)} of the base model beside its weights"
        )
    try:
        tokenizer("a \u2603")  # a word, and a sign that few vocabularies have
    except Exception as error:  # as above
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot read text ({reason:.120})") from None
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):
        raise UserError(f"the tokenizer in {folder} knows no words: expected the base model's vocabulary")
    for name in ("cls", "sep", "pad", "unk"):
        token, number = getattr(tokenizer, f"{name}_token", None), getattr(tokenizer, f"{name}_token_id", None)
        if token is not None and number is not None and number >= tokenizer.vocab_size:
            # transformers adds what a vocabulary lacks at its end, where the model knows something else or nothing.
            raise UserError(f"the tokenizer in {folder} lacks {token!r} in its vocabulary: expected the base model's")
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {largest}, the model's embedding {vocab_size} rows: expected the "
            f"tokenizer that belongs to this model"
        )
    if words and not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {folder} cannot tell which token is of which word: expected a fast one")
    return tokenizer
