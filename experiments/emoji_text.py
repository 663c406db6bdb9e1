"""The words of the emoji's captions as tokens, and a small text encoder of CLIP's kind."""

import re
from collections import Counter

import torch

from images import emoji

LENGTH = 20                                 # tokens of a caption: its words, begin and end


def words():
    said = " ".join([*emoji.names(), *emoji.COLOURS, *emoji.WORDINGS, "a an and ,"])
    return sorted(set(re.findall(r"[a-z]+|,", re.sub(r"{.*?}", "", said))))


def byte_pairs(vocabulary):
    """The merges that make one token of every word: the commonest pair first."""
    split = {word: [*word[:-1], word[-1] + "</w>"] for word in vocabulary}
    merges = []
    while any(len(parts) > 1 for parts in split.values()):
        counts = Counter(pair for parts in split.values() for pair in zip(parts, parts[1:]))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            split[word] = merged(parts, best)
    return merges


def merged(parts, pair):
    """The parts of a word with every neighbouring `pair` joined, from the left."""
    joined = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def new_tokenizer():
    """CLIP's kind, with our words whole; any other word falls into bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer
    letters = sorted(ByteLevel.alphabet())
    merges = byte_pairs(words())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges),
              "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def new_text_encoder(tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def token_ids(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH,
                     return_tensors="pt").input_ids
