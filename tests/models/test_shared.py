"""What the runs of one process share."""

from __future__ import annotations

import shutil

from dpkd.models.settings import ModelSettings
from dpkd.models.shared import Shared


def test_folders_with_the_same_tokenizer_have_one_between_them(tiny_folder, tmp_path):
    """Each run saves the tokenizer of its start beside its own model."""
    copy, other = tmp_path / "copy", tmp_path / "other"
    for folder in (copy, other):
        shutil.copytree(tiny_folder, folder)
    (other / "chat_template.jinja").write_text("{{ messages }}")
    shared = Shared()
    first, second, third = (shared.tokenizer(ModelSettings(model=str(f))) for f in (tiny_folder, copy, other))
    assert first is second
    assert third is not first
    assert third.chat_template == "{{ messages }}"
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert shared.tokenizer(ModelSettings(model=str(copy))) is third
