"""A conversion from end to end in a minute: a Llama with random weights becomes a recurrent model that generates.

python examples/convert_tiny.py FOLDER
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seqtrain.cli import main

folder = Path(sys.argv[1])
letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokens = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
config = transformers.LlamaConfig(
    vocab_size=len(letters),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(folder / "teacher")
tokenizer.save_pretrained(folder / "teacher")

options = ["target=gla", "layer.window=16", "verify.tokens=64", "verify.sequences=1", "verify.generate=8"]
status = main(["convert", f"source={folder / 'teacher'}", f"output_dir={folder / 'converted'}", *options])
assert status == 0, "the checks of the conversion have failed"

student = transformers.AutoModelForCausalLM.from_pretrained(folder / "converted" / "model")
prompt = tokenizer("hello", return_tensors="pt").input_ids
print(tokenizer.decode(student.generate(prompt, max_new_tokens=20)[0]))
