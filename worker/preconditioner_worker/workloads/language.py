"""An artificial language and its translation, drawn from a generator that is specified to the bit.

Every random number is a double of numpy's PCG64 (``Generator.random``, whose stream is fixed), turned into a
choice by the inverse of a distribution function; nothing depends on a version of numpy.

- Sentences have 4 to 12 words, all lengths equally likely.
- The source vocabulary has V words; the r-th most frequent has a probability in proportion to 1 / r (Zipf).
- The class of word w is w mod 4: noun, adjective, verb, adverb.
- The lexicon is a fixed permutation of the vocabulary. Every eighth word is ambiguous: after an adjective it
  is translated by the next word's translation.
- Reordering: an adjective changes places with a noun that follows it, from left to right; then all verbs go
  to the end of the sentence, in their order.
"""

from __future__ import annotations

import numpy as np
from numpy.random import PCG64, Generator
from numpy.typing import NDArray

LEAST_WORDS, MOST_WORDS = 4, 12
NOUN, ADJECTIVE, VERB, CLASSES = 0, 1, 2, 4
AMBIGUOUS_EVERY = 8
LEXICON_SEED = 1914

Words = NDArray[np.int64]


class Language:
    """Draws and translates sentences.

    Args:
        vocabulary: number of words V.
    """

    def __init__(self, vocabulary: int) -> None:
        frequencies = 1 / np.arange(1, vocabulary + 1)
        self._distribution = np.cumsum(frequencies) / frequencies.sum()
        # Sorting distinct doubles is a permutation that no version of numpy shuffles otherwise.
        self.lexicon: Words = np.argsort(Generator(PCG64(LEXICON_SEED)).random(vocabulary), kind="stable")

    def sentence(self, random: Generator) -> Words:
        """A sentence of the source language, (length,)."""
        length = LEAST_WORDS + int(random.random() * (MOST_WORDS + 1 - LEAST_WORDS))
        return np.searchsorted(self._distribution, random.random(length), side="right").astype(np.int64)

    def translate(self, words: Words) -> Words:
        """Its translation, of the same length."""
        translated = [self._translate_word(words, position) for position in range(len(words))]
        classes = [int(word) % CLASSES for word in words]
        order = list(range(len(words)))
        position = 0
        while position + 1 < len(order):
            if classes[order[position]] == ADJECTIVE and classes[order[position + 1]] == NOUN:
                order[position], order[position + 1] = order[position + 1], order[position]
                position += 1
            position += 1
        order.sort(key=lambda place: classes[place] == VERB)  # stable
        return np.array([translated[place] for place in order], dtype=np.int64)

    def _translate_word(self, words: Words, position: int) -> int:
        word = int(words[position])
        after_adjective = position > 0 and int(words[position - 1]) % CLASSES == ADJECTIVE
        if word % AMBIGUOUS_EVERY == 0 and after_adjective:
            word = (word + 1) % len(self.lexicon)
        return int(self.lexicon[word])
