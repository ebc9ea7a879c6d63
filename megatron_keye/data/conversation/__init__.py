# SPDX-License-Identifier: Apache-2.0
"""Records of sample files, in the form of any usual trainer, become conversations of one form.

`parse.py` puts a record together: `forms.py` finds its turns, `turn.py` reads one, `content.py`
its text and media, `media.py` names and limits of media, `tools.py` tools and calls; `keys.py` has
the keys that are refused or only counted.
"""

from megatron_keye.data.conversation.keys import describe_unread
from megatron_keye.data.conversation.parse import parse_conversation
from megatron_keye.data.conversation.turns import Conversation, Message, Part

__all__ = ["Conversation", "Message", "Part", "describe_unread", "parse_conversation"]
