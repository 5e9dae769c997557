"""Models by their name on the Hugging Face hub, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from support.models import tiny_model, tiny_tokenizer

import fastlm
from fastlm.model.hub import FILES

NAME = "someone/tiny-model"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "a model"
    tokenizer = tiny_tokenizer()
    tiny_model(vocab_size=tokenizer.get_vocab_size()).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture
def asked(folder, monkeypatch) -> list[tuple[str, list[str]]]:
    """What the hub was asked for; it has NAME alone."""
    asked = []

    def snapshot_download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        if name != NAME:
            raise errors.LocalEntryNotFoundError("no such\nentry")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_name_is_downloaded_and_read(folder, asked):
    ids = torch.randint(256, (1, 9))
    model = fastlm.CausalLM.from_pretrained(NAME, dtype=torch.float32)
    lm = fastlm.load(NAME, device="cpu")
    want = fastlm.load(folder, device="cpu")
    assert asked == [(NAME, list(FILES))] * 2
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, want.model(ids).logits)
    assert lm.generate("the cat", 9) == want.generate("the cat", 9)


def test_only_what_is_read_is_asked_for():
    def wanted(name):
        return any(fnmatch(name, pattern) for pattern in FILES)

    names = ["config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json"]
    names += ["vocab.json", "merges.txt", "tokenizer.model", "additional_chat_templates/a.jinja"]
    assert all(map(wanted, [*names, "model-00001-of-00002.safetensors"]))
    others = ["pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "run.py"]
    assert not any(map(wanted, others))


def test_a_folder_is_a_folder(folder, asked, tmp_path, monkeypatch):
    fastlm.load(folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    (tmp_path / NAME).symlink_to(folder)
    fastlm.load(NAME)
    assert not asked


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./someone/none", "a/b/c", "some one/none", "", Path(NAME)]
)
def test_what_can_be_no_name_is_not_asked_for(source, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fastlm.ModelFileError, match=r"no such folder$|config.json is missing"):
        fastlm.load(source)
    assert not asked


def test_a_file_is_no_folder(folder, asked):
    with pytest.raises(fastlm.ModelFileError, match=r"config.json: must be a folder, got a file"):
        fastlm.load(str(folder / "config.json"))


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    headers: dict[str, str]
    request, status_code = None, 404

    def __init__(self) -> None:
        self.headers = {}


FAULTS = {
    "not found": (
        lambda: errors.RepositoryNotFoundError("404", response=Response()),
        "no such folder, nor a model that the Hugging Face hub shows us",
    ),
    "gated": (
        lambda: errors.GatedRepoError("403", response=Response()),
        "on the Hugging Face hub asks for its terms to be accepted there, and for a login",
    ),
    "not cached": (
        lambda: errors.LocalEntryNotFoundError("gone\nfar"),
        "which is offline or out of reach; where there is a network, hf download "
        f"{NAME} --local-dir DIR makes a folder of it",
    ),
    "server": (
        lambda: errors.HfHubHTTPError("500 it\nbroke", response=Response()),
        "not to be had from the Hugging Face hub: 500 it",
    ),
    "disk": (
        lambda: OSError(28, "No space left on device"),
        "not to be had from the Hugging Face hub: .*No space left on device",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_one_line_that_names_the_model(fault, monkeypatch):
    make, message = FAULTS[fault]

    def snapshot_download(*args, **options):
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(fastlm.ModelFileError, match=rf"^{NAME}: .*{message}$") as caught:
        fastlm.CausalLM.from_pretrained(NAME)
    assert "\n" not in str(caught.value)


def test_without_the_hubs_client_folders_are_left(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fastlm.load(folder)
    with pytest.raises(fastlm.ModelFileError, match="the Hugging Face hub need huggingface_hub"):
        fastlm.load(NAME)


def test_offline_the_cache_is_all_there_is(folder, tmp_path):
    place = tmp_path / "home/hub/models--someone--tiny-model"
    snapshot, blobs = place / "snapshots" / ("0" * 40), place / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (place / "refs").mkdir()
    (place / "refs/main").write_text(snapshot.name)
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    script = f"""
import fastlm
print(fastlm.load({NAME!r}).generate("the cat", 3))
try:
    fastlm.load("someone/other")
except fastlm.ModelFileError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *_, line = done.stdout.splitlines()
    assert line == (
        "someone/other: no such folder, and not in the cache of the Hugging Face hub, "
        "which is offline or out of reach; where there is a network, hf download someone/other "
        "--local-dir DIR makes a folder of it"
    )
