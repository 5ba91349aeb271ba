"""A tokenizer of one's own: byte-level BPE, trained on the `text` field of JSON lines.

python examples/train_tokenizer.py CORPUS.jsonl TOKENIZER.json VOCABULARY
"""

import json
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def texts(file: str) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


corpus, target, vocabulary = sys.argv[1:]
tokenizer = Tokenizer(models.BPE())
# Any text can be written: what has no token of its own is spelled in bytes.
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=int(vocabulary),
    special_tokens=["<|end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
tokenizer.train_from_iterator(texts(corpus), trainer)
tokenizer.save(target)
print(f"{target}: {tokenizer.get_vocab_size()} tokens; train with data.tokenizer={target} 'data.end_token=<|end|>'")
