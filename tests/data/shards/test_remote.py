"""Shards elsewhere are read as those of a folder are: over HTTP, by many processes, and bounded."""

import json
import pickle
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from cldf_dist.__main__ import main
from cldf_dist.config import Augment, Data, load
from cldf_dist.data.shards.remote import RemoteShards, ShardCache
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.write import write_manifest, write_shards
from cldf_dist.data.slices import Slice
from cldf_dist.data.stream import LabelledSlices, Stream
from cldf_dist.system.files import DamagedShardError

NUM_SLICES, PER_SHARD = 12, 3
READ_ALL = """
import sys, time
from pathlib import Path
from cldf_dist.data.shards.table import ShardSet
from cldf_dist.data.shards.remote import ShardCache
cache = ShardCache(Path(sys.argv[2]), int(sys.argv[3]))
table = ShardSet(sys.argv[1], cache=cache).split("train")
print("ready", flush=True)
while not Path(sys.argv[4]).exists():
    time.sleep(0.01)
for row in range(len(table)):
    table.read_image(row)
"""


class Server:
    """A folder over HTTP that counts what is asked for, and may fail or stall."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.failures = 0  # of the next requests
        self.stall = threading.Event()
        self.stall.set()
        handler = partial(_Handler, self, directory=str(folder))
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.stall.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: Any, **settings: Any) -> None:
        self.owner = server
        super().__init__(*arguments, **settings)

    def do_GET(self) -> None:
        self.owner.asked[self.path] += 1
        if self.owner.failures:
            self.owner.failures -= 1
            self.send_error(503)
        else:
            super().do_GET()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read(1000))
        outputfile.flush()
        self.owner.stall.wait()
        shutil.copyfileobj(source, outputfile)

    def log_message(self, *arguments: Any) -> None:
        pass


def write_set(folder: Path) -> None:
    source = np.random.default_rng(0)
    slices = [
        Slice(
            key=f"case_{index:04d}",
            patient="case",
            index=index,
            label=index % 2,
            image=source.uniform(-0.9, 1, (2, 32, 32)).astype(np.float32),
            mask=source.random((32, 32)) > 0.5,
        )
        for index in range(NUM_SLICES)
    ]
    write_manifest(
        folder,
        settings={},
        channels=("a", "b"),
        splits={"train": ["case"]},
        geometry={},
        shards=write_shards(folder, "train", slices, PER_SHARD),
    )


def point_to(url: str, source: Path, folder: Path) -> ShardSet:
    """What `prepare` leaves in `folder` when it is told of the shards at `url`."""
    folder.mkdir(exist_ok=True)
    manifest = json.loads((source / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "location": url}))
    return ShardSet(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_set(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def server(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("cldf_dist.data.shards.remote.FIRST_PAUSE_SECONDS", 0.01)
    server = Server(source)
    yield server
    server.close()


def shards_of(source: Path) -> list[dict[str, Any]]:
    shards: list[dict[str, Any]] = json.loads((source / "manifest.json").read_text())["shards"]
    return shards


def total_size(source: Path) -> int:
    return sum(shard["size"] for shard in shards_of(source))


def opened(url: str, source: Path, folder: Path, max_bytes: int = 10**9, **more: Any) -> ShardSet:
    point_to(url, source, folder)
    return ShardSet(folder, cache=ShardCache(folder.parent / "cache", max_bytes), **more)


def copies(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*.tar"))


def first_batches(shards: ShardSet, num_workers: int = 0) -> list[dict[str, torch.Tensor]]:
    items = LabelledSlices(shards.split("train"), Augment(), 0)
    batches = Stream(items, items.groups, 0).batches(0, batch_size=4, num_workers=num_workers)
    found = [next(batches) for _ in range(5)]
    batches.close()
    return found


def assert_equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, Any]]) -> None:
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["file", "http", "memory"])
def test_shards_elsewhere_give_the_same_samples(
    source: Path, server: Server, tmp_path: Path, kind: str
) -> None:
    url = {"file": source.as_uri(), "http": server.url, "memory": f"memory://{tmp_path.name}"}[kind]
    if kind == "memory":
        fsspec.filesystem("memory").put(str(source), f"/{tmp_path.name}", recursive=True)
    shards = opened(url, source, tmp_path / "run")
    assert_equal(first_batches(shards), first_batches(ShardSet(source)))
    assert len(copies(tmp_path)) == len(shards_of(source))
    shards.verify()
    mask, expected = (one.split("train").read_mask(3) for one in (shards, ShardSet(source)))
    np.testing.assert_array_equal(mask, expected)
    if kind == "http":  # the second epoch and the verification read the copies
        assert set(server.asked.values()) == {1}


@pytest.mark.slow
def test_a_worker_process_stages_shards_too(source: Path, server: Server, tmp_path: Path) -> None:
    shards = opened(server.url, source, tmp_path / "run")
    assert_equal(first_batches(shards, num_workers=1), first_batches(ShardSet(source)))
    assert set(server.asked.values()) == {1}


def test_opening_reads_nothing_from_elsewhere(source: Path, tmp_path: Path) -> None:
    shards = opened("s3://nowhere/at/all", source, tmp_path / "run")
    assert len(shards.split("train")) == NUM_SLICES
    assert len(pickle.loads(pickle.dumps(shards.split("train")))) == NUM_SLICES
    assert not (tmp_path / "cache").exists()


def test_the_cache_stays_within_its_bound_and_evicts_the_least_recently_opened(
    source: Path, tmp_path: Path
) -> None:
    records = shards_of(source)
    bound = sum(record["size"] for record in records[:2])
    cache = ShardCache(tmp_path / "cache", bound)
    remote = RemoteShards(source.as_uri(), cache)
    for number in (0, 1, 0, 2, 0, 3):  # 0 is always the more recent of two
        with open(remote.open(records[number]), "rb") as file:
            assert file.read() == (source / records[number]["name"]).read_bytes()
        assert sum(path.stat().st_size for path in copies(tmp_path)) <= bound
        assert cache.path(records[0]).exists()
        assert cache.path(records[number]).exists()


def test_an_evicted_shard_stays_readable_and_few_are_kept_open(
    source: Path, tmp_path: Path
) -> None:
    largest = max(record["size"] for record in shards_of(source))
    point_to(source.as_uri(), source, tmp_path / "run")
    cache = ShardCache(tmp_path / "cache", largest)
    with pytest.warns(UserWarning, match=r"every node reads every shard in every epoch"):
        shards = ShardSet(tmp_path / "run", cache=cache)
    table, local = shards.split("train"), ShardSet(source).split("train")
    for row in [*range(NUM_SLICES), 0, NUM_SLICES - 1]:
        np.testing.assert_array_equal(table.read_stored(row), local.read_stored(row))
        assert len(copies(tmp_path)) == 1


def test_a_cache_that_holds_no_shard_is_refused_with_both_sizes(
    source: Path, tmp_path: Path
) -> None:
    size = shards_of(source)[0]["size"]
    with pytest.raises(ValueError, match=rf"at least one shard, got 1000 bytes .* of {size} bytes"):
        opened(source.as_uri(), source, tmp_path / "run", max_bytes=1000)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [1, 4])
def test_processes_of_a_node_download_a_shard_once_and_never_exceed_the_bound(
    source: Path, server: Server, tmp_path: Path, start: Callable[..., Any], share: int
) -> None:
    """With room for all, one download each; with room for one, they wait for each other."""
    point_to(server.url, source, tmp_path / "run")
    bound = total_size(source) // share
    go = tmp_path / "go"
    folders = [str(tmp_path / name) for name in ("run", "cache")]
    words = ["-W", "ignore", "-c", READ_ALL, *folders, str(bound), str(go)]
    readers = [start(*words) for _ in range(2)]
    assert [reader.stdout.readline() for reader in readers] == ["ready\n"] * 2
    go.touch()
    while any(reader.poll() is None for reader in readers):
        assert sum(_size(path) for path in (tmp_path / "cache").glob("*.tar")) <= bound
    assert [reader.returncode for reader in readers] == [0, 0], readers[0].stderr.read()
    assert set(server.asked) == {f"/{shard['name']}" for shard in shards_of(source)}
    if share == 1:
        assert set(server.asked.values()) == {1}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.slow
def test_a_killed_download_leaves_nothing_wrong(
    source: Path, server: Server, tmp_path: Path, start: Callable[..., Any], wait_until: Any
) -> None:
    shards = opened(server.url, source, tmp_path / "run", max_bytes=total_size(source))
    server.stall.clear()
    words = [str(tmp_path / "run"), str(tmp_path / "cache"), str(total_size(source)), str(tmp_path)]
    reader = start("-c", READ_ALL, *words)
    wait_until(lambda: list((tmp_path / "cache").glob("*.partial")), reader)
    wait_until(lambda: bool(server.asked), reader)
    reader.kill()
    reader.wait()
    assert len(list((tmp_path / "cache").glob("*.partial"))) == 1
    server.stall.set()
    shards.split("train").read_image(NUM_SLICES - 1)  # another shard: its reader sweeps
    assert not list((tmp_path / "cache").glob("*.partial"))
    assert_equal(first_batches(shards), first_batches(ShardSet(source)))


def test_a_server_that_fails_twice_is_asked_again(
    source: Path, server: Server, tmp_path: Path
) -> None:
    server.failures = 2
    shards = opened(server.url, source, tmp_path / "run")
    shards.split("train").read_image(0)
    assert server.asked["/train-00000.tar"] == 3


def test_a_place_that_does_not_answer_is_named(
    source: Path, server: Server, tmp_path: Path
) -> None:
    table = opened(server.url, source, tmp_path / "run").split("train")
    server.failures = 100
    with pytest.raises(ConnectionError, match=rf"{server.url}/train-00000\.tar .* 4 times: 503"):
        table.read_image(0)
    server.close()
    with pytest.raises(ConnectionError, match=r"train-00001\.tar cannot be read, tried 4 times"):
        table.read_image(PER_SHARD)
    assert not list((tmp_path / "cache").glob("*.partial"))


@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_a_damaged_shard_elsewhere_is_named_and_may_be_left_out(
    source: Path, server: Server, tmp_path: Path, kind: str
) -> None:
    path = source / "train-00001.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content[: len(content) // 2 if kind == "truncated" else None])
    if kind == "missing":
        path.unlink()
    table = opened(server.url, source, tmp_path / "run").split("train")
    expected = {"flipped": "is damaged", "truncated": "is truncated", "missing": "is missing"}[kind]
    for _ in range(2):  # a copy that was found wrong is not kept
        with pytest.raises(DamagedShardError, match=rf"{server.url}/train-00001\.tar {expected}"):
            table.read_image(PER_SHARD)
    table.read_image(0)
    skipping = opened(server.url, source, tmp_path / "run", on_damaged="skip")
    server.asked.clear()
    with pytest.warns(UserWarning, match=rf"{PER_SHARD} of {NUM_SLICES} slices are damaged"):
        intact = skipping.split("train")
    assert intact.shard_of.tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]
    assert server.asked["/train-00001.tar"] == (4 if kind == "truncated" else 1)


def test_a_copy_that_becomes_damaged_on_the_node_is_fetched_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = opened(source.as_uri(), source, tmp_path / "run")
    shards.verify()
    copy = shards.split("train")._files.path(0)
    content = bytearray(copy.read_bytes())
    span = shards_of(source)[0]["samples"][0]["image"]
    content[span[0] + span[1] - 1] ^= 1
    copy.write_bytes(content)
    found = shards.split("train").read_image(0)
    np.testing.assert_array_equal(found, ShardSet(source).split("train").read_image(0))
    assert f"{copy} has become damaged and is fetched again" in capsys.readouterr().err
    copy.write_bytes(content[:100])  # as after a power cut
    ShardSet(tmp_path / "run", cache=ShardCache(tmp_path / "cache", 10**9)).verify()


def test_a_protocol_without_its_package_names_it(source: Path, tmp_path: Path) -> None:
    table = opened("s3://bucket/set", source, tmp_path / "run").split("train")
    with pytest.raises(ValueError, match=r"s3://bucket/set/train-00000\.tar .* s3fs"):
        table.read_image(0)
    table = opened("nonsense://set", source, tmp_path / "run").split("train")
    with pytest.raises(ValueError, match=r"Protocol not known: nonsense"):
        table.read_image(0)


def test_the_usual_cache_is_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache = ShardCache.of(Data(shard_cache_gb=0.5))
    assert cache.folder.parent == tmp_path
    assert cache.max_bytes == 500_000_000
    assert ShardCache.of(Data(shard_cache="/scratch/x")).folder == Path("/scratch/x")


@pytest.mark.slow
def test_a_run_with_shards_elsewhere_trains_the_same_net(debug_run: Any, tmp_path: Path) -> None:
    url = (debug_run.folder / "prepare").as_uri()
    run = debug_run.copy_to(tmp_path)
    words = [*run.words, f"data.shards={url}/", f"data.shard_cache={tmp_path / 'cache'}"]
    assert main(["prepare", *words]) == 0
    assert main(["train-cam", *words]) == 0
    assert main(["prepare", *words]) == 0  # finished, and found unchanged
    assert not list((run.folder / "prepare").glob("*.tar"))
    assert copies(tmp_path)
    same = [Path("train-cam", "net.safetensors")]
    same += [Path("prepare", "truth", path.name) for path in _truth(debug_run)]
    for name in same:
        assert (run.folder / name).read_bytes() == (debug_run.folder / name).read_bytes()
    kept, expected = (
        json.loads((x.folder / "prepare" / "DONE").read_text()) for x in (run, debug_run)
    )
    assert {**kept, "finished": 0} == {**expected, "finished": 0}


def _truth(run: Any) -> list[Path]:
    found = sorted((run.folder / "prepare" / "truth").iterdir())
    assert found
    return found


@pytest.mark.slow
def test_evaluation_and_report_read_shards_elsewhere(
    debug_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stages = [path.name for path in debug_run.folder.iterdir() if path.is_dir()]
    run = debug_run.copy_to(tmp_path, *(set(stages) - {"evaluate", "report"}))
    for path in (run.folder / "prepare").glob("*.tar"):
        path.unlink()
    point_to(
        (debug_run.folder / "prepare").as_uri(), run.folder / "prepare", run.folder / "prepare"
    )
    for stage in ("evaluate", "report"):
        assert main([stage, *run.words]) == 0
    table = Path("evaluate", "table.txt")
    assert (run.folder / table).read_text() == (debug_run.folder / table).read_text()
    assert list(tmp_path.glob("cldf-shards-*/*.tar"))  # the report shows the slices


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.image_size=64"], r"prepared with data\.image_size=32, not 64; set what it was"),
        (["data.test_fraction=0.3"], r"data\.test_fraction=0\.25, not 0\.3"),
        (["data.phantom.seed=1"], r"data\.phantom="),
        (["data.shard_cache_gb=1e-6"], r"at least one shard, got 1000 bytes"),
    ],
)
def test_settings_that_the_shards_were_not_made_with_are_refused(
    debug_run: Any, tmp_path: Path, capsys: Any, words: list[str], expected: str
) -> None:
    run = debug_run.copy_to(tmp_path)
    url = (debug_run.folder / "prepare").as_uri()
    assert main(["prepare", *run.words, f"data.shards={url}", *words]) == 1
    assert re.search(expected, capsys.readouterr().err)
    assert not (run.folder / "prepare" / "manifest.json").exists()


def test_splits_file_must_be_that_of_the_shards(
    debug_run: Any, tmp_path: Path, capsys: Any
) -> None:
    folder = debug_run.folder / "prepare"
    splits = dict(ShardSet(folder).patients)
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(splits))
    run = debug_run.copy_to(tmp_path)
    words = ["prepare", *run.words, f"data.shards={folder.as_uri()}", f"data.splits={path}"]
    assert main(words) == 0
    assert main(words) == 0
    shutil.rmtree(run.folder)
    path.write_text(json.dumps({**splits, "train": splits["test"], "test": splits["train"]}))
    assert main(words) == 1
    assert "splits.json is not the split of" in capsys.readouterr().err


def test_an_address_without_a_manifest_is_refused(
    debug_run: Any, server: Server, tmp_path: Path, capsys: Any
) -> None:
    run = debug_run.copy_to(tmp_path)
    assert main(["prepare", *run.words, f"data.shards={server.url}/away"]) == 1
    assert f"there is no {server.url}/away/manifest.json" in capsys.readouterr().err
    assert main(["prepare", *run.words, f"data.shards={tmp_path}"]) == 1
    assert "data.shards must be a URL" in capsys.readouterr().err


def test_data_root_is_not_needed_where_the_shards_are_made() -> None:
    root = Path(__file__).parents[3]
    brats = [str(root / "configs" / "brats.yaml")]
    assert load(brats, ["data.root=", "data.shards=s3://bucket/brats"]).data.root == ""
    with pytest.raises(ValueError, match=r"data\.shards holds the slices of one object"):
        load(brats, ["data.shards=s3://bucket/brats", "data.object=each"])
    with pytest.raises(ValueError, match=r"data\.shard_cache_gb must be > 0, got 0"):
        load(brats, ["data.root=x", "data.shard_cache_gb=0"])
