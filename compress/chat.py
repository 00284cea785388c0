"""What a model's chat template says around the words of a conversation."""

from __future__ import annotations

from typing import Any

from .model import TokenizerFiles

Messages = list[dict[str, Any]]


def rendered(
    files: TokenizerFiles, messages: Messages, *, tools: list[Any] | None = None, prompt: bool = False
) -> str | None:
    """The conversation as the template writes it; None without a template, or if the template refuses it.

    Args:
        files: the tokenizer.
        messages: role and content each.
        tools: descriptions of functions, if there are any.
        prompt: whether it ends with the opening of the model's turn.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if files.chat_template is None:
        return None
    special = {key: value for key, value in files.config.items() if key.endswith("_token")}
    how: dict[str, Any] = {"chat_template": files.chat_template, "add_generation_prompt": prompt, **special}
    try:
        texts: Any = render_jinja_template([messages], tools=tools, **how)[0]
    except TemplateError:
        return None
    return str(texts[0])


def before_user(files: TokenizerFiles) -> str:
    """What the template says before the user's first words; nothing without a template."""
    words = "words of a user"
    text = rendered(files, [{"role": "user", "content": words}])
    return text.partition(words)[0] if text else ""
