"""A teacher behind a vLLM server: its hidden states, and so the exact divergence, or its log-probabilities alone."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from ..core.fingerprint import fingerprint, fingerprint_of_weights
from ._checkpoint import load_config, load_head
from ._server import EXACT_SERVER_COMMAND, TeacherServer, TeacherServerError, awaited


_Position = tuple[dict[int, float], int]  # log-probabilities by token id, and the sequence's own token id
_Read = TypeVar("_Read")
_PROBE = [0, 1, 2]  # token ids that every vocabulary has
_WIRE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_ENTRY_BYTES = 512  # of one token's log-probability in JSON, its text included


class RemoteTeacher:
    """
    Teacher that a vLLM server runs. The server is asked what it is:

    - a pooling server that returns every token's hidden state is *exact*: [`~RemoteTeacher.hidden_states`] and `head`
      give the divergence over the full vocabulary, at any temperature, with only the head in this process;
    - a completion server gives log-probabilities: [`~RemoteTeacher.log_probs`] and [`~RemoteTeacher.top_k`].

    Args:
        url (`str`):
            Address of the server, `http://host:8000` for one.
        api_key (`str`, *optional*):
            Key that the server was started with. Sent to it alone, never logged.
        model (`str`, *optional*):
            Local folder or hub id of the checkpoint that the server runs, for its config and, where exact, its head.
            By default what the server names as its model, which for a folder must be readable under the same path.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds until an answer begins, its headers included, and again that its body may take.
        max_wait (`float`, *optional*, defaults to `600.0`):
            Seconds for which a failing request is tried again before [`TeacherServerError`] is raised.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of sequences under way at once; the server batches them.

    Attributes:
        exact (`bool`): Whether the server returns hidden states.
        config ([`~transformers.PretrainedConfig`]): The teacher's config.
        vocab_size (`int`): Size of its vocabulary, padding included.
        max_model_len (`int`): Longest sequence that the server takes, in tokens.
        head ([`~core.Head`] or `None`): The teacher's head on the CPU, in the dtype that the server computes in, if exact.
        concurrency (`int`): Number of sequences under way at once.
        dtype (`torch.dtype`): That dtype, and the hidden states'; `float32` if not exact.

    Raises:
        TeacherServerError: If nothing answers, the key is wrong, or the server is of no use.
        ValueError: If the URL or the key cannot be used, or the checkpoint cannot be read.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        model: str | None = None,
        revision: str | None = None,
        timeout: float = 120.0,
        max_wait: float = 600.0,
        concurrency: int = 16,
    ):
        self._server = TeacherServer(url, api_key, timeout=timeout, max_wait=max_wait, concurrency=concurrency)
        self.concurrency = concurrency
        self.url = self._server.url
        self._model_id, root, self.max_model_len = self._describe()
        hidden = self._probe_hidden_states()
        self.exact = hidden is not None
        if not self.exact:
            self._probe_log_probs()
        source = model or root
        self.config = load_config(source, revision)
        self.vocab_size = self.config.get_text_config().vocab_size
        self.head, self.dtype = None, torch.float32
        if hidden is not None:
            head = load_head(source, self.config, revision)
            if hidden.size(1) != head.weight.size(1):
                raise TeacherServerError(
                    f"The teacher server at {self.url} returns {hidden.size(1)} values per token and the head of "
                    f"{source!r} takes {head.weight.size(1)}: they are different models. Pass the checkpoint that the "
                    "server runs."
                )
            self.dtype = computed_dtype(hidden)
            self.head = head.to(self.dtype)
            self.hidden_states([_PROBE], [2])  # the binary form, which older servers lack

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def fingerprint(self) -> str:
        """Of what the server names its model, and of the head. The weights between are out of sight."""
        head = [] if self.head is None else [("head", self.head.weight)]
        return fingerprint([self._model_id, fingerprint_of_weights(head)])

    def hidden_states(self, sequences: Sequence[list[int]], num_last: Sequence[int]) -> list[torch.Tensor]:
        """
        Hidden states that predict the last tokens of each sequence: those at `-(k + 1):-1`, after the final norm.

        Args:
            sequences (`Sequence[list[int]]`):
                Token ids, without padding.
            num_last (`Sequence[int]`):
                Number k of tokens at the end of each sequence, less than its length.

        Returns:
            `list[torch.Tensor]`: Hidden states of shape `(k, H)` per sequence, on the CPU, in `dtype`.

        Raises:
            TeacherServerError: If the server is gone for longer than `max_wait`, or answers what cannot be true.
            ValueError: If the server is not exact, or a sequence is too long for it.
        """
        return awaited(self.ask_hidden_states(sequences, num_last))

    def ask_hidden_states(self, sequences: Sequence[list[int]], num_last: Sequence[int]) -> Future[list[torch.Tensor]]:
        """As [`~RemoteTeacher.hidden_states`], for whoever waits for it; cancelling it ends the requests."""
        if self.head is None:
            raise ValueError(
                f"The teacher server at {self.url} returns log-probabilities only, and the full-vocabulary divergence "
                f"needs hidden states. Start it with: {EXACT_SERVER_COMMAND}"
            )
        # The last token is predicted and predicts nothing that is asked for.
        self._check(sequences, num_last, [len(sequence) - 1 for sequence in sequences], self.max_model_len)
        width = self.head.weight.size(1)

        async def fetch(item: tuple[list[int], int]) -> torch.Tensor:
            sequence, count = item
            if count == 0:
                return torch.empty(0, width, dtype=self.dtype)
            payload = {
                "model": self._model_id,
                "input": sequence[:-1],
                "task": "token_embed",
                "use_activation": False,
                "encoding_format": "bytes_only",
                "embed_dtype": _WIRE_NAMES[self.dtype],
                "endianness": sys.byteorder,
            }
            expected = (len(sequence) - 1) * width * self.dtype.itemsize
            body = await self._server.post("/pooling", payload, expected)
            if len(body) != expected:
                raise self._server.unexpected(
                    f"{len(body)} bytes where {len(sequence) - 1} hidden states of {width} values in {self.dtype} "
                    f"are {expected}"
                )
            hidden = torch.frombuffer(body, dtype=self.dtype).view(-1, width)
            return hidden[-count:].clone()  # not the whole sequence's memory

        return self._server.ask(fetch, list(zip(sequences, num_last, strict=True)))

    def log_probs(
        self, sequences: Sequence[list[int]], num_last: Sequence[int], temperature: float = 1.0
    ) -> list[torch.Tensor]:
        """
        Log-probabilities of the last tokens of each sequence, from a completion server.

        Args:
            sequences (`Sequence[list[int]]`):
                Token ids, without padding.
            num_last (`Sequence[int]`):
                Number k of tokens at the end of each sequence, less than its length.
            temperature (`float`, *optional*, defaults to `1.0`):
                Must be 1, the only temperature at which vLLM scores a prompt.

        Returns:
            `list[torch.Tensor]`: Log-probabilities of shape `(k,)` per sequence, in nats and float32.

        Raises:
            TeacherServerError: If the server is gone for longer than `max_wait`, or answers what cannot be true.
            ValueError: If the server is exact, a sequence too long for it, or the temperature not 1.
        """
        return awaited(self.ask_log_probs(sequences, num_last, temperature))

    def ask_log_probs(
        self, sequences: Sequence[list[int]], num_last: Sequence[int], temperature: float = 1.0
    ) -> Future[list[torch.Tensor]]:
        """As [`~RemoteTeacher.log_probs`], for whoever waits for it; cancelling it ends the requests."""

        def own_tokens(row: list[_Position]) -> torch.Tensor:
            return torch.tensor([position[token_id] for position, token_id in row], dtype=torch.float32)

        return self._score(own_tokens, sequences, num_last, 0, temperature)

    def top_k(
        self, sequences: Sequence[list[int]], num_last: Sequence[int], k: int, temperature: float = 1.0
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """
        The teacher's k most likely tokens at each of the last positions, from a completion server. With the student's
        log-probabilities of the same tokens they bound the divergence from below, see
        [`~core.top_k_divergence_lower_bound`].

        Args:
            sequences (`Sequence[list[int]]`):
                Token ids, without padding.
            num_last (`Sequence[int]`):
                Number n of tokens at the end of each sequence, less than its length.
            k (`int`):
                Number of tokens, at most the server's `--max-logprobs` (20 by default).
            temperature (`float`, *optional*, defaults to `1.0`):
                Must be 1, the only temperature at which vLLM scores a prompt.

        Returns:
            `list[tuple[torch.Tensor, torch.Tensor]]`: Token ids of shape `(n, k)` and their log-probabilities of shape
            `(n, k)` in nats and float32, most likely first, per sequence.

        Raises:
            TeacherServerError: If the server is gone for longer than `max_wait`, refuses `k`, or answers what cannot
                be right.
            ValueError: If the server is exact, a sequence too long for it, or the temperature not 1.
        """
        return awaited(self.ask_top_k(sequences, num_last, k, temperature))

    def ask_top_k(
        self, sequences: Sequence[list[int]], num_last: Sequence[int], k: int, temperature: float = 1.0
    ) -> Future[list[tuple[torch.Tensor, torch.Tensor]]]:
        """As [`~RemoteTeacher.top_k`], for whoever waits for it; cancelling it ends the requests."""
        if k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")

        def likeliest(row: list[_Position]) -> tuple[torch.Tensor, torch.Tensor]:
            # The sequence's own token comes on top of the k where it is not among them.
            likely = [sorted(position.items(), key=lambda entry: -entry[1])[:k] for position, _ in row]
            token_ids = torch.tensor([[token_id for token_id, _ in entries] for entries in likely], dtype=torch.int64)
            logps = torch.tensor([[logp for _, logp in entries] for entries in likely], dtype=torch.float32)
            return token_ids.view(-1, k), logps.view(-1, k)

        return self._score(likeliest, sequences, num_last, k, temperature)

    def _score(self, read: Callable[[list[_Position]], _Read], sequences, num_last, k, temperature) -> Future:
        """What is read of the positions of each sequence, with the log-probabilities of the k likeliest tokens."""
        if self.exact:
            raise ValueError(
                f"The teacher server at {self.url} returns hidden states: compute log-probabilities from them and "
                "`head`, or start it as a completion server (`vllm serve MODEL`)."
            )
        if temperature != 1.0:
            raise ValueError(
                f"A completion server scores at temperature 1 only, got {temperature}: the normaliser at another "
                "temperature needs the full vocabulary. Train at `temperature=1.0`, or start an exact server: "
                f"{EXACT_SERVER_COMMAND}"
            )
        # The server insists on generating one token after the sequence.
        self._check(sequences, num_last, [len(sequence) for sequence in sequences], self.max_model_len - 1)

        async def fetch(item: tuple[list[int], int]) -> _Read:
            sequence, count = item
            if count == 0:
                return read([])
            payload = self._completion_payload(sequence, k)
            max_bytes = len(sequence) * (k + 1) * _ENTRY_BYTES + 2**16
            answer = self._server.decode(await self._server.post("/v1/completions", payload, max_bytes))
            try:
                positions = answer["choices"][0]["prompt_logprobs"]
                if len(positions) != len(sequence):
                    raise self._server.unexpected(f"{len(positions)} positions for {len(sequence)} tokens")
                own = zip(positions[-count:], sequence[-count:], strict=True)
                return read([(self._read_position(position, token_id, k), token_id) for position, token_id in own])
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise self._server.unexpected(
                    f"log-probabilities that cannot be read ({type(error).__name__})"
                ) from None

        return self._server.ask(fetch, list(zip(sequences, num_last, strict=True)))

    def _read_position(self, position: dict[str, dict[str, Any]], token_id: int, k: int) -> dict[int, float]:
        logps = {int(key): float(entry["logprob"]) for key, entry in position.items()}
        if token_id not in logps or len(logps) < k:
            raise self._server.unexpected(
                f"{len(logps)} tokens, where the sequence's own and the {k} likeliest belong"
            )
        if any(not 0 <= key < self.vocab_size for key in logps):
            raise self._server.unexpected("a token id beyond the vocabulary")
        if not all(logp <= 1e-3 for logp in logps.values()):  # NaN is none either
            raise self._server.unexpected(
                "what are no log-probabilities: NaN, or above 0 as `--logprobs-mode raw_logits` makes them"
            )
        return logps

    def _completion_payload(self, sequence: list[int], k: int) -> dict[str, Any]:
        return {
            "model": self._model_id,
            "prompt": sequence,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
        }

    def _check(self, sequences, num_last, lengths, longest) -> None:
        for sequence, count, length in zip(sequences, num_last, lengths, strict=True):
            if not 0 <= count < len(sequence):
                raise ValueError(f"`num_last` must lie between 0 and {len(sequence) - 1}, got {count}.")
            if count > 0 and length > longest:
                raise ValueError(
                    f"A sequence of {len(sequence)} tokens is longer than the teacher server at {self.url} takes "
                    f"(max_model_len {self.max_model_len}). Start it with a larger `--max-model-len`, or shorten "
                    "prompts and `max_completion_length`."
                )

    # ------------------------------------------------------------------------------------------- what the server is

    def _describe(self) -> tuple[str, str, int]:
        """Model id, checkpoint and longest sequence."""
        try:
            models = self._server.probe("/v1/models")
        except TeacherServerError as error:
            if error.status is None:
                raise TeacherServerError(
                    f"{error} Start one, and wait until it answers, then start the training: {EXACT_SERVER_COMMAND}"
                ) from None
            if error.status == 404:
                raise TeacherServerError(
                    f"What answers at {self.url} is not a vLLM server: it has no /v1/models. Start one: "
                    f"{EXACT_SERVER_COMMAND}",
                    error.status,
                ) from None
            raise
        try:
            entry = models["data"][0]
            model_id, root, longest = entry["id"], entry["root"], entry["max_model_len"]
        except (LookupError, TypeError):
            model_id, root, longest = None, None, None
        if not (isinstance(model_id, str) and isinstance(root, str) and type(longest) is int):
            raise TeacherServerError(
                f"What answers at {self.url} is not a vLLM server: its /v1/models does not name a model, its `root` "
                f"and `max_model_len`. Start one: {EXACT_SERVER_COMMAND}"
            )
        return model_id, root, longest

    def _probe_hidden_states(self) -> torch.Tensor | None:
        """Hidden states (3, H) of three tokens, or `None` from a server that does not pool."""
        payload = {
            "model": self._model_id,
            "input": _PROBE,
            "task": "token_embed",
            "use_activation": False,
            "encoding_format": "float",
        }
        try:
            answer = self._server.probe("/pooling", payload)
        except TeacherServerError as error:
            if error.status in (404, 405):
                return None
            if error.status is not None and error.status not in (401, 403):
                raise self._wrong_pooler(str(error).rstrip(".")) from None
            raise
        try:
            hidden = torch.tensor(answer["data"][0]["data"], dtype=torch.float32)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
            hidden = torch.empty(0)
        if hidden.dim() != 2 or len(hidden) != len(_PROBE) or hidden.size(1) == 0:
            shape = "×".join(map(str, hidden.shape))
            raise self._wrong_pooler(f"for {len(_PROBE)} tokens it sent values of shape {shape}")
        if torch.allclose(hidden.norm(dim=1), torch.ones(len(_PROBE)), atol=1e-2):
            raise self._wrong_pooler("its values are normalised to length 1")
        return hidden

    def _wrong_pooler(self, problem: str) -> TeacherServerError:
        return TeacherServerError(
            f"The pooling server at {self.url} does not return every token's own hidden state: {problem}. Start it "
            f"with: {EXACT_SERVER_COMMAND}"
        )

    def _probe_log_probs(self) -> None:
        try:
            answer = self._server.probe("/v1/completions", self._completion_payload(_PROBE, 0))
            known = len(answer["choices"][0]["prompt_logprobs"]) == len(_PROBE)
        except TeacherServerError as error:
            if error.status != 404:
                raise
            known = False
        except (LookupError, TypeError):
            known = False
        if not known:
            raise TeacherServerError(
                f"The server at {self.url} gives neither hidden states (/pooling) nor the log-probabilities of a "
                f"prompt (/v1/completions with `prompt_logprobs`). Start an exact one: {EXACT_SERVER_COMMAND}"
            )


def computed_dtype(values: torch.Tensor) -> torch.dtype:
    """
    Dtype that float32 values were computed in: the narrowest that holds them all.

    A server does not say, and its `--dtype` may differ from the checkpoint's.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values, values.to(dtype).float()):
            return dtype
    return torch.float32
