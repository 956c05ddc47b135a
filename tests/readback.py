"""Ids back to messages: what tests and benchmarks need to look into rows."""

from collections.abc import Iterable

import data


def messages_of(ids: Iterable[int]) -> data.Conversation:
    """The conversation that `data.render` turned into ids; of a shortened one, what is left."""
    messages, ids = [], [int(i) for i in ids]
    starts = [t for t, i in enumerate(ids) if i == data.EOT]
    headers = {role: data.render([{"role": role, "content": ""}])[0][:-1].tolist() for role in data.ROLES}
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        role = next((role for role, header in headers.items() if ids[start:start + len(header)] == header), None)
        if role:  # the last <|endoftext|> opens nothing
            messages.append({"role": role, "content": data.text_of(ids[start + len(headers[role]):end])})
    return messages
