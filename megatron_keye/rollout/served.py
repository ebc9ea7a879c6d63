# SPDX-License-Identifier: Apache-2.0
"""The engine that asks an SGLang server: token ids go out, token ids and log-probabilities come.

The server batches what is asked at once, and shares what prompts have in common, by itself. Its
draws are its own. Interface: SGLang's native API, /generate and /flush_cache.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib import import_module
from itertools import islice
from typing import Any

from megatron_keye.config.run import RunConfig
from megatron_keye.errors import UserError
from megatron_keye.rollout.request import Completion, Finish, NewToken, Request

_FINISHES: dict[str, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}
"""By the server's word."""


def import_http_client(setting: str) -> Any:
    """Return the module that asks servers, of the extra `served`.

    Args:
        setting: What asks for it.

    Raises:
        UserError: When it is not installed.
    """
    try:
        return import_module("httpx2")
    except ImportError as error:
        raise UserError(
            f"{setting}: got no installed httpx2, which asks a server; install it with "
            'pip install "megatron-keye[served]"'
        ) from error


class ServedEngine:
    """Answers requests through a server; needs the extra `served`."""

    def __init__(self, run: RunConfig) -> None:
        """Prepare to ask; the server is not contacted yet.

        Args:
            run: The server's URL and limits, and the placeholders of pictures.

        Raises:
            UserError: When httpx2 is not installed.
        """
        self._http = import_http_client("rollout.server")
        self.version = 0
        """Of the weights that answer."""
        self._rollout = run.rollout
        self._placeholders = frozenset(run.model.vision_token_ids)
        self._url = run.rollout.server.rstrip("/")
        self._client = self._http.Client(timeout=run.rollout.server_timeout_seconds)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def take_weights(self, version: int) -> None:
        """Let the server, which has loaded other weights, drop what it kept of earlier ones.

        Raises:
            UserError: When it does not answer.
        """
        self._post("flush_cache", {})
        self.version = version

    def generate(
        self, requests: Iterable[Request], on_token: Callable[[NewToken], None] | None = None
    ) -> Iterator[Completion]:
        """Yield answers in the order in which they end.

        Args:
            requests: Taken as the server has room for them (rollout.max_sequences).
            on_token: Called with the tokens of an answer when it has ended.

        Raises:
            UserError: When the server fails, a prompt has pictures, or log-probabilities of the
                law are not what the server gives.
        """
        asked = ((each, answer) for each in requests for answer in range(each.num_answers))
        with ThreadPoolExecutor(self._rollout.max_sequences) as threads:
            running: set[Future[Completion]] = set()
            try:
                while True:
                    room = self._rollout.max_sequences - len(running)
                    running |= {threads.submit(self._ask, *pair) for pair in islice(asked, room)}
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for completion in [future.result() for future in done]:
                        if on_token is not None:
                            _announce(completion, on_token)
                        yield completion
            finally:
                for future in running:
                    future.cancel()

    def _ask(self, request: Request, answer: int) -> Completion:
        """Ask for one answer and wait for it; runs in a thread."""
        _check(request)
        law = request.law
        reply = self._post(
            "generate",
            {
                "input_ids": request.prompt.token_ids.tolist(),
                "return_logprob": True,
                "sampling_params": {
                    "temperature": law.temperature,
                    "max_new_tokens": request.max_new_tokens,
                    "stop_token_ids": list(request.stop_ids),
                },
            },
        )
        try:
            told = reply["meta_info"]
            drawn = [(int(each[1]), float(each[0])) for each in told["output_token_logprobs"]]
            finish = _FINISHES[told["finish_reason"]["type"]]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"rollout.server: got {str(reply)[:200]!r} from {self._url}/generate, expected "
                "meta_info with output_token_logprobs and finish_reason, as SGLang answers"
            ) from error
        return self._completion(request, answer, drawn, finish)

    def _completion(
        self, request: Request, answer: int, drawn: list[tuple[int, float]], finish: Finish
    ) -> Completion:
        ids = [token for token, _ in drawn]
        cut = next((n for n, token in enumerate(ids) if token in self._placeholders), None)
        if cut is not None:
            drawn, finish = drawn[:cut], "aborted"
        elif finish == "stop" and (not ids or ids[-1] not in request.stop_ids):
            raise UserError(
                f"rollout.server: an answer ends with token {ids[-1:]}, expected one of "
                f"{request.stop_ids}; start the server with the tokenizer of data.tokenizer"
            )
        return Completion(
            key=request.key,
            answer=answer,
            token_ids=tuple(token for token, _ in drawn),
            log_probs=tuple(log_prob for _, log_prob in drawn),
            finish=finish,
            versions=((self.version, len(drawn)),) if drawn else (),
        )

    def _post(self, name: str, content: dict[str, Any]) -> Any:
        """Send JSON to the server and return what it answers, in JSON or as text."""
        url = f"{self._url}/{name}"
        try:
            response = self._client.post(url, json=content)
            response.raise_for_status()
            is_json = response.headers.get("content-type", "").startswith("application/json")
            return response.json() if is_json else response.text
        except (self._http.HTTPError, self._http.InvalidURL, ValueError) as error:
            raise UserError(
                f"rollout.server: {url} failed ({error or type(error).__name__}), expected an "
                "SGLang server that answers; start it, or correct the URL"
            ) from error


def _check(request: Request) -> None:
    """Raise unless the server answers what is asked, under the law that is asked for."""
    name, law = request.prompt.name, request.law
    if request.begun:
        raise ValueError(f"{name}: has answers that have begun, which no server goes on with")
    if request.prompt.pictures:
        raise UserError(
            f"{name}: has {len(request.prompt.pictures)} pictures, expected text alone with "
            "rollout.server; leave that out to answer here"
        )
    if law.is_cut or law.temperature not in (0, 1):
        raise UserError(
            f"rollout.temperature: got {law.temperature:g} with top_p {law.top_p:g} and top_k "
            f"{law.top_k}, expected 0 or 1 without a cut: a server tells log-probabilities of the "
            "uncut law at temperature 1 alone"
        )


def _announce(completion: Completion, on_token: Callable[[NewToken], None]) -> None:
    for token, log_prob in zip(completion.token_ids, completion.log_probs, strict=True):
        on_token(
            NewToken(
                key=completion.key, answer=completion.answer, token_id=token, log_prob=log_prob
            )
        )
