"""Seeds as a function of their purpose: nothing in training reads a global random state."""

import hashlib

SEED_BITS = 63  # fits a signed 64-bit integer, so that torch, numpy and JSON all take it


def sample_seed(seed: int, sample_number: int, purpose: str) -> int:
    """A seed in [0, 2^63), a function of the three arguments alone.

    `purpose` separates the random numbers of one sample: "augment", "noise" and so on. The result
    is the same on every machine, in every process and after every resume.
    """
    text = f"{seed}:{sample_number}:{purpose}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)
