"""Where randomness that privacy rests on comes from: sampling masks, Gaussian noise, seeds of dropout.

Guarantees: a stream is keyed by the operating system's entropy (kinds "os" and "secure") or, for tests alone, by a seed
(kind "seeded"); never by --random_seed. Streams of different purposes, ranks or instances never share a key. A key is
never written, printed or pickled. Where the operating system gives no entropy the run stops: there is no second source.

One mechanism: 64-bit words -> uniforms of 53 bits -> normals in float64 by Box and Muller (1958), up to 8.57 sigma.
What differs is where the words come from.
  os      SFC64 of numpy, its 192-bit state filled from 256 bits of entropy. Not torch.Generator on the CPU: that keeps
          32 bits of its seed and no more, so its noise could be found by trying all seeds. On a GPU, torch's Philox
          generator with a 64-bit seed, in the buffer's type.
  secure  AES-256 in counter mode (NIST SP 800-38A) with a key of 256 bits, on the CPU; the arithmetic is on `device`.
          Nobody who sees the noise, or knows parts of it, can tell the rest.
  seeded  as os, with the key sha256(seed, purpose, rank, step): a resumed run draws what the uninterrupted one drew.
          Anyone who knows the seed can subtract the noise.

Normals a second, one core, float32 buffer of 124 million: tests/privacy/test_noise.py::test_speed prints them.
"""

import hashlib
import math
import os
from typing import NoReturn, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from base.device import upload
from base.errors import fail

KINDS = ("os", "secure", "seeded")
PURPOSES = ("mask", "noise", "dropout")
KEY_BYTES = 32
MERSENNE_WORDS = 624  # the state of torch's generator on the CPU, 32 bits each
CPU_CHUNK = 2**15  # normals made at a time: their float64 working set of 1 MB stays in the second-level cache
DEVICE_CHUNK = 2**22  # on a GPU a chunk has to pay for a dozen kernel launches


class Sfc64Words:
    """64-bit words of numpy's SFC64."""

    def __init__(self, key: bytes):
        seed = np.random.SeedSequence(int.from_bytes(key, "little"), pool_size=8)
        self.generator = np.random.SFC64(seed)

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64."""
        return self.generator.random_raw(count)


class AesCtrWords:
    """64-bit words of the AES-CTR key stream: the encryption of zeros, the counter starting at `counter` (16 bytes)."""

    def __init__(self, key: bytes, counter: bytes = bytes(16)):
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            fail(
                "--noise_source secure: needs the package cryptography, which is not installed; "
                "pip install -r requirements.txt"
            )
        self.encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64, little-endian from the bytes of the stream, which goes on where the last call ended."""
        stream = np.empty(8 * count + 16, dtype=np.uint8)  # update_into wants room for a block more than it writes
        written = self.encryptor.update_into(bytes(8 * count), stream.data)
        if written != 8 * count:
            raise RuntimeError(f"the key stream gave {written} bytes where {8 * count} were asked for")
        return stream[:written].view("<u8")


def fresh_key(kind: str) -> bytes:
    """KEY_BYTES of the operating system's entropy, or UserError: noise without entropy protects nobody."""
    try:
        key = os.urandom(KEY_BYTES)
    except (OSError, NotImplementedError) as error:
        fail(f"--noise_source {kind}: the operating system gave no entropy ({error}); no run is private here")
    if len(key) != KEY_BYTES:
        fail(f"--noise_source {kind}: the operating system gave {len(key)} bytes of entropy, wanted {KEY_BYTES}")
    return key


class NoiseSource:
    """One stream of randomness: a rank's sampling masks, its noise, or its seeds of dropout."""

    def __init__(
        self, kind: str, purpose: str, rank: int = 0, seed: int | None = None, device: torch.device | str = "cpu"
    ):
        """kind: one of KINDS; purpose: one of PURPOSES; seed: of kind "seeded", and of no other.

        device: where add_normal_ finds its buffers. Raises UserError where there is no entropy or no `cryptography`.
        """
        if kind not in KINDS:
            fail(f"--noise_source {kind}: wanted one of {', '.join(KINDS)}")
        if purpose not in PURPOSES:
            raise ValueError(f"purpose {purpose!r}: expected one of {PURPOSES}")
        if (seed is not None) != (kind == "seeded"):
            raise ValueError(f"a seed belongs to kind 'seeded' and to no other: got kind {kind!r}, seed {seed!r}")
        self.kind, self.purpose, self.rank, self.device = kind, purpose, rank, torch.device(device)
        self._seed = seed
        self._start(fresh_key(kind) if seed is None else self._step_key(0))

    def _step_key(self, step: int) -> bytes:
        return hashlib.sha256(f"{self._seed},{self.purpose},{self.rank},{step}".encode()).digest()

    def _start(self, key: bytes) -> None:
        self._source = AesCtrWords(key) if self.kind == "secure" else Sfc64Words(key)
        self._generator = None
        if self.kind != "secure" and self.device.type != "cpu":
            self._generator = torch.Generator(self.device)
            # Not the key itself: masks come from that one's words, and this seed can be read back from the generator.
            self._generator.manual_seed(int.from_bytes(hashlib.sha256(key + b"device").digest()[:8], "little"))

    def __repr__(self) -> str:
        return f"NoiseSource({self.kind!r}, {self.purpose!r}, rank={self.rank}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError("a NoiseSource is never pickled or copied: its key would leave the process, or be used twice")

    def begin_step(self, step: int) -> None:
        """Kind "seeded": start the stream of `step` afresh. The others go on: their noise never repeats."""
        if self.kind == "seeded":
            self._start(self._step_key(step))

    def uniform(self, count: int) -> Tensor:
        """(count,) float64 on the CPU: independent uniforms in [0, 1), multiples of 2^-53."""
        return torch.from_numpy(self._uniform(count))

    def _uniform(self, count: int) -> np.ndarray:
        words = self._source.words(count)
        words >>= 11
        uniform = words.astype(np.float64)  # exact: 53 bits
        uniform *= 2.0**-53
        return uniform

    def permutation(self, count: int) -> Tensor:
        """(count,) int64 on the CPU: 0 .. count - 1 in an order of which each is equally likely.

        The order that sorts `count` random words; words that tie are drawn again, all of them.
        """
        while True:
            words = self._source.words(count)
            order = np.argsort(words, kind="stable")
            ordered = words[order]
            if not (ordered[1:] == ordered[:-1]).any():
                return torch.from_numpy(order.astype(np.int64, copy=False))

    def seed_torch(self) -> None:
        """Start torch's default generators, which dropout draws from, afresh from this stream.

        On the CPU all 624 words of the Mersenne Twister are filled. torch.manual_seed would keep 32 bits, and so few
        seeds can be tried one by one: a step's masks would be known to whoever knows the other units. Other devices'
        generators (Philox) take 64 bits.
        """
        words = self._source.words(MERSENNE_WORDS + 1)
        torch.manual_seed(int(words[0]))
        state = torch.get_rng_state()  # seed (8 bytes), left, seeded, next (16), the words as uint64, ...
        state[24 : 24 + 8 * MERSENNE_WORDS] = torch.from_numpy((words[1:] >> 32).view(np.uint8))
        torch.set_rng_state(state)

    @torch.no_grad()
    def add_normal_(self, buffer: Tensor, std: float) -> None:
        """buffer (n,) on `device`, float64 or float32: add independent N(0, std^2) to each entry, a chunk at a time."""
        if (
            buffer.dtype not in (torch.float64, torch.float32)
            or buffer.dim() != 1
            or buffer.device.type != self.device.type
        ):
            got = f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
            raise ValueError(f"expected a vector of floats on {self.device}, got {got}")
        if not 0 <= std < math.inf:
            raise ValueError(f"expected a finite std >= 0., got {std}")
        for chunk in buffer.split(CPU_CHUNK if self.device.type == "cpu" else DEVICE_CHUNK):
            if self._generator is not None:
                chunk.add_(torch.empty_like(chunk).normal_(generator=self._generator), alpha=std)
            else:
                self._add_box_muller(chunk, std)

    def _add_box_muller(self, chunk: Tensor, std: float) -> None:
        """chunk (m,): two uniforms u, v make the two normals sqrt(-2 log(1 - u)) cos and sin (2 pi v)."""
        pairs = (len(chunk) + 1) // 2
        polar = self._uniform(2 * pairs)
        radius = polar[:pairs]
        radius += 2.0**-53  # uniform on the multiples in (0, 1]: the logarithm never sees 0
        # numpy's logarithm and root take half the time of torch's, torch's sine and cosine less than half of numpy's.
        np.log(radius, out=radius)
        radius *= -2 * std**2
        np.sqrt(radius, out=radius)
        polar[pairs:] *= 2 * math.pi
        drawn = upload(torch.from_numpy(polar), self.device)
        radius, angle = drawn[:pairs], drawn[pairs:]
        chunk[:pairs].add_(torch.cos(angle).mul_(radius))
        chunk[pairs:].add_(torch.sin(angle).mul_(radius)[: len(chunk) - pairs])
