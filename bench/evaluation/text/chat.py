"""Text prompts as conversations, rendered with a tokenizer's chat template and found by prompt.

The harness builds the messages; they are rendered as by lm-eval's own `hf` model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jinja2.exceptions import TemplateError

from bench.errors import UserError, error_sentence, unknown_name

if TYPE_CHECKING:
    from bench.schema import BenchmarkConfig
    from bench.ui import Progress

TextMessage = Mapping[str, str]
"""`role` and `content` of one turn, the form of messages in lm-eval."""


class ChatTokenizer(Protocol):
    """The interface of a tokenizer that renders conversations."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(self, conversation: Sequence[TextMessage], **options: object) -> str:
        """Return the text of a conversation."""


class Conversation(NamedTuple):
    """Facts about the messages of a prompt.

    `question` is their hash; `repeats` says that a few-shot example is the question itself.
    """

    question: str
    repeats: bool


def select_template(benchmark: BenchmarkConfig, tokenizer: Any, model: str) -> str | None:
    """Return the chat template that a benchmark selects from a tokenizer, or None.

    Raises:
        UserError: the tokenizer has no template, or none of this name.
    """
    choice = benchmark.chat_template
    if choice is False:
        return None
    found: str | dict[str, str] | None = getattr(tokenizer, "chat_template", None)
    if not found:
        raise UserError(
            f"benchmark.chat_template={str(choice).lower()}: the tokenizer of model {model} has no "
            "chat template: leave it false, or add chat_template.jinja to the model's folder"
        )
    templates = found if isinstance(found, dict) else {"default": found}
    name = "default" if choice is True else str(choice)
    if name not in templates:
        raise unknown_name(f"template in benchmark.chat_template of model {model}", name, templates)
    return templates[name]


@dataclass
class ChatRenderer:
    """Renders conversations with one template, and stores facts about them by prompt."""

    tokenizer: ChatTokenizer
    template: str | None
    arguments: Mapping[str, object]
    progress: Progress

    def __post_init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}
        self._without_system = False

    def render(self, messages: Sequence[TextMessage], *, add_generation_prompt: bool) -> str:
        """Return the prompt; a system message is left out if the template does not support it.

        Raises:
            UserError: the template fails.
        """
        try:
            prompt = self._apply(messages, add_generation_prompt)
        except TemplateError as error:
            # As in lm-eval, whose tasks put their descriptions into a system message.
            others = [each for each in messages if each["role"] != "system"]
            if len(others) == len(messages):
                raise _failing(error) from error
            prompt = self._apply_without_system(others, add_generation_prompt)
        self.conversations[prompt] = conversation_of(messages, add_generation_prompt)
        return prompt

    def _apply(self, messages: Sequence[TextMessage], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.arguments,
        )

    def _apply_without_system(
        self, messages: Sequence[TextMessage], add_generation_prompt: bool
    ) -> str:
        try:
            prompt = self._apply(messages, add_generation_prompt)
        except TemplateError as error:
            raise _failing(error) from error
        if not self._without_system:
            self._without_system = True
            self.progress.warn(
                "the chat template takes no system message, so the tasks' descriptions are left "
                "out, as in lm-eval"
            )
        return prompt


def _failing(error: Exception) -> UserError:
    return UserError(
        f"benchmark.chat_template: the model's template fails: {error_sentence(error)}"
    )


def conversation_of(messages: Sequence[TextMessage], add_generation_prompt: bool) -> Conversation:
    """Return facts about the messages of a prompt, which do not depend on the template."""
    users = [message["content"] for message in messages if message["role"] == "user"]
    digest = hashlib.sha256(conversation_text(messages, add_generation_prompt).encode()).hexdigest()
    return Conversation(digest, bool(users) and users[-1] in users[:-1])


def conversation_text(messages: Sequence[TextMessage], add_generation_prompt: bool) -> str:
    """Return messages as one text without any template."""
    turns = [[message["role"], message["content"]] for message in messages]
    return json.dumps([turns, add_generation_prompt], ensure_ascii=False)


def check_chat(benchmark: BenchmarkConfig, tokenizer: Any, model: str) -> None:
    """Raise UserError unless a tokenizer supports the chat settings of a benchmark."""
    from bench.ui import SILENT

    template = select_template(benchmark, tokenizer, model)
    if template is None:
        return
    renderer = ChatRenderer(tokenizer, template, benchmark.chat_template_args, SILENT)
    question = [{"role": "user", "content": "Is it so?"}]
    renderer.render(question, add_generation_prompt=True)
    if not benchmark.system_prompt:
        return
    try:
        with_system = [{"role": "system", "content": benchmark.system_prompt}, *question]
        renderer._apply(with_system, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(
            f"benchmark.system_prompt: the chat template of model {model} does not support a "
            f"system message ({error_sentence(error)}): set it to null"
        ) from error
