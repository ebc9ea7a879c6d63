# SPDX-License-Identifier: Apache-2.0
"""The page of the data's form has a record that is read, and names every array of a store."""

import re
from pathlib import Path

from megatron_keye.data.conversation.media import LIMIT_KEYS, LIST_KEYS
from megatron_keye.data.conversation.parse import parse_conversation
from megatron_keye.data.store.array import ARRAYS
from tests.support.doc_pages import ROOT, blocks_of

PAGE = ROOT / "docs" / "data_format.md"
NAMES = set(re.findall(r"`([\w/]+)`", PAGE.read_text()))


def test_the_record_is_read_whole() -> None:
    [record] = [block.text for block in blocks_of(PAGE) if block.language == "json"]
    conversation = parse_conversation(record, "page", Path())
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.unread == ("id",)


def test_every_array_of_a_store_is_named() -> None:
    assert not {name.split("/")[-1] for name in ARRAYS} - {name.split("/")[-1] for name in NAMES}


def test_every_key_of_media_is_named() -> None:
    keys = {key for table in (LIMIT_KEYS, LIST_KEYS) for names in table.values() for key in names}
    assert not keys - NAMES
