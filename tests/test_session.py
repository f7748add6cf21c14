"""One session for every caller: requests from several threads, cancelling, what a run leaves behind, and what it took."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import mxdit
import tiny
from mxdit.checkpoint import quantize_checkpoint
from mxdit.errors import Cancelled, CheckpointError, ConfigError, InputError, ModelError
from mxdit.generation.session import Result, Session

pytestmark = pytest.mark.slow

SMALL = {"prompt": "a red seven", "size": (16, 16), "frames": 5, "steps": 4, "guidance": 3.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "t2v")


@pytest.fixture(scope="module")
def session(directory: Path) -> Session:
    return Session.open(directory)


def test_three_lines_make_a_video(tmp_path):
    session = mxdit.Session.open()
    result = session.run(session.request(frames=5, steps=2))
    result.save(tmp_path / "seven.mp4")
    assert isinstance(result, mxdit.Result) and isinstance(result.request, mxdit.Request)
    assert result.request.prompt == "a red seven moving left on a blue background"
    with av.open(str(tmp_path / "seven.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == result.request.fps == 8
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_requests_of_other_settings_from_several_threads(session):
    requests = [
        session.request(**SMALL),
        session.request(**SMALL, flow_shift=12.0, boundary_ratio=0.3),
        session.request(**SMALL, flow_shift=1.0, boundary_ratio=0.6, seed=1),
    ]
    alone = [session.run(request).frames for request in requests]
    assert not np.array_equal(alone[0], alone[1])
    together: dict[int, np.ndarray] = {}
    order: list[int] = []

    def work(index: int) -> None:
        together[index] = session.run(requests[index], lambda *_: order.append(index)).frames

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone[index], together[index]) for index in range(len(requests)))
    assert sorted(order[::4]) == [0, 1, 2] and order == [index for index in order[::4] for _ in range(4)]


def test_a_run_leaves_the_pipeline_as_it_was(session):
    pipeline = session.load()
    scheduler, before = pipeline.scheduler, dict(vars(pipeline))
    config, own = dict(pipeline.config), dict(scheduler.config)
    seen = []
    session.run(
        session.request(**SMALL, flow_shift=12.0, boundary_ratio=0.3),
        lambda *_: seen.append((pipeline.scheduler is scheduler, pipeline.config.boundary_ratio)),
    )
    assert seen == [(True, 0.875)] * 4  # nor is it another one in between, when another thread may look
    assert dict(vars(pipeline)) == before and dict(pipeline.config) == config and dict(scheduler.config) == own
    assert scheduler.num_inference_steps is None  # it has not been stepped


def test_a_cancelled_run_ends_between_steps_and_leaves_the_session_usable(session):
    request, stop, steps = session.request(**SMALL), threading.Event(), []
    expected = session.run(request).frames

    def on_step(done: int, _: int) -> None:
        steps.append(done)
        if done == 2:
            stop.set()

    with pytest.raises(Cancelled, match="cancelled"):
        session.run(request, on_step, stop)
    assert steps == [1, 2]
    with pytest.raises(Cancelled):
        session.run(request, on_step, stop)  # before it begins
    assert steps == [1, 2]
    assert np.array_equal(session.run(request, stop=threading.Event()).frames, expected)


def test_a_run_that_waits_for_its_turn_can_be_cancelled(session):
    stop, ended = threading.Event(), []

    def wait() -> None:
        try:
            session.run(session.request(**SMALL), stop=stop)
        except Cancelled as error:
            ended.append(error)

    with session.lock:
        thread = threading.Thread(target=wait)
        thread.start()
        assert thread.is_alive() and not ended
        stop.set()
        thread.join(timeout=60)
        assert len(ended) == 1
        session.run(session.request(**SMALL))  # whoever holds the lock can run


def test_a_run_that_fails_leaves_the_session_usable(session):
    request = session.request(**SMALL, flow_shift=12.0)
    expected = session.run(request).frames

    def on_step(*_: int) -> None:
        raise KeyError("a caller's own fault")

    with pytest.raises(KeyError):
        session.run(request, on_step)
    assert np.array_equal(session.run(request).frames, expected)


def test_a_run_is_not_begun_inside_another(session):
    request = session.request(**SMALL)
    with pytest.raises(ModelError, match="begun inside another"):
        session.run(request, lambda done, total: session.run(request))
    assert session.run(request).frames.shape[0] == 5


def test_a_component_left_alone_stays_so_over_stored_weights(directory, tmp_path):
    Session.open(directory, method="mxfp4").load().save_pretrained(tmp_path / "stored")
    opened = Session.open(tmp_path / "stored", keys={"activation": "bf16"}, components={"transformer_2": None})
    assert opened.configs["transformer"].activation == "bf16" and opened.configs["transformer_2"] is None


@pytest.mark.parametrize("of", (5, {}, "x", []))
def test_a_component_that_is_no_list_is_refused(directory, tmp_path, of):
    index = json.loads((directory / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": of}))
    with pytest.raises(CheckpointError, match="no list of its library and class"):
        Session.open(tmp_path)


def test_numbers_that_are_none_are_refused_not_shown(directory):
    session = Session.open(directory)
    with torch.no_grad():
        session.load().transformer_2.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN or inf"):
        session.run(session.request(**SMALL))


def test_memory_is_that_of_the_run_itself(session):
    ballast = torch.ones(64 << 20)  # 256 MiB
    heavy = session.run(session.request(**SMALL)).peak_bytes
    del ballast
    light = session.run(session.request(**SMALL)).peak_bytes
    assert heavy is not None and light is not None and heavy - light > 200 << 20


def test_latents_are_told_after_each_step(session):
    told = []
    session.run(session.request(**SMALL), on_latents=lambda step, latents: told.append((step, latents.shape)))
    assert told == [(step, (1, 16, 2, 2, 2)) for step in range(4)]


def test_a_request_is_json(tmp_path, directory):
    session = Session.open(directory)
    values = json.loads(json.dumps(session.request(**SMALL, fps=5).to_dict()))
    assert (values["task"], values["fps"], values["image"], values["height"]) == ("t2v", 5, None, 16)
    i2v = Session.open(tiny.save(tmp_path / "i2v", "i2v"))
    pixels = [Image.new("RGB", (16, 16), color) for color in ("red", "red", "blue")]
    digests = [i2v.request(**SMALL, image=image).to_dict()["image"] for image in pixels]
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64
    with pytest.raises(InputError, match="another task"):
        session.run(i2v.request(**SMALL, image=pixels[0]))


def test_errors_name_the_field(session, tmp_path):
    for fields, field in (
        ({"size": (20, 16)}, "size"),
        ({"size": (16,)}, "size"),
        ({"size": "16x16"}, "size"),
        ({"size": (16, 1024)}, "size"),
        ({"frames": 6}, "frames"),
        ({"frames": 133}, "frames"),
        ({"steps": 0}, "steps"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"image": Image.new("RGB", (16, 16))}, "image"),
        ({"guidance_2": float("inf")}, "guidance_2"),
        ({"boundary_ratio": 1.0}, "boundary_ratio"),
        ({"flow_shift": -1.0}, "flow_shift"),
        ({"fps": 0}, "fps"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InputError) as caught:
            session.request(**{**SMALL, **fields})
        assert caught.value.field == field and str(caught.value).startswith(f"{field}: ")
        assert caught.value.line(str.upper) == str(caught.value).replace(field, field.upper(), 1)


def test_a_session_refuses_before_it_loads(directory):
    with pytest.raises(InputError, match="a text-to-video model"):
        Session.open(directory, task="i2v")
    with pytest.raises(InputError, match="unknown method") as caught:
        Session.open(directory, method="mxfp5")
    assert caught.value.field == "method"
    with pytest.raises(ConfigError, match="without a method"):
        Session.open(directory, keys={"activation": "bf16"})
    with pytest.raises(ConfigError, match="options, and no quantization"):
        Session.open(directory, method="none", keys={"activation": "bf16"})
    with pytest.raises(InputError, match="the bundled model does not do this"):
        Session.open(task="t2i")
    with pytest.raises(ConfigError, match="transformer_3"):
        Session.open(directory, method="mxfp4", components={"transformer_3": None})


def test_a_directory_without_weights_can_be_asked_and_not_loaded(tmp_path, directory):
    for file in [*directory.rglob("*.json"), *directory.rglob("*.model")]:
        copy = tmp_path / file.relative_to(directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    session = Session.open(tmp_path)
    assert session.request(**SMALL).steps == 4
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        session.load()


def test_files_by_their_ending(session, tmp_path):
    def result(frames: int) -> Result:
        pixels = np.full((frames, 16, 16, 3), 77, np.uint8)
        return Result(pixels, (0.1,), 0.1, None, session.request(**SMALL))

    result(1).save(tmp_path / "one.png")
    assert np.asarray(Image.open(tmp_path / "one.png")).shape == (16, 16, 3)
    result(1).save(str(tmp_path / "one.mp4"), fps=3)
    with av.open(str(tmp_path / "one.mp4")) as container:
        assert container.streams.video[0].average_rate == 3
    with pytest.raises(InputError, match="one frame"):
        result(2).save(tmp_path / "two.png")
    with pytest.raises(InputError, match=r"\.mp4 or \.png"):
        result(2).save(tmp_path / "two.gif")
    with pytest.raises(InputError, match="could not be written"):
        result(1).save(tmp_path / "none" / "one.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.mp4", "one.png"]


@pytest.mark.slow
def test_loading_says_nothing_that_a_user_cannot_act_on(directory):
    code = (
        "import sys, mxdit; from mxdit.generation import loading; from transformers.utils import logging; "
        "loading.show_loading(False); before = logging.get_verbosity(); mxdit.Session.open(sys.argv[1]).load(); "
        "assert logging.get_verbosity() == before"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stderr and "[transformers]" not in done.stderr


# -- activations by step -------------------------------------------------------------------------------------------------

POLICY = {"mxfp8": [0, 3], "bf16": [2], "of": 4}


@pytest.fixture(scope="module")
def by_step(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cascade quantized, its first expert with a policy in its config."""
    target = tmp_path_factory.mktemp("stored") / "mxfp4"
    config = {"quant_method": "mxfp4", "activation_steps": POLICY}
    quantize_checkpoint(directory, target, config, {"transformer_2": "mxfp4"}).write()
    return target


def test_a_request_asks_for_activations_by_step(directory, by_step, caplog):
    online = Session.open(directory, method="mxfp4")
    plain = online.run(online.request(**SMALL)).frames
    request = online.request(**SMALL, activation_steps=POLICY)
    assert request.to_dict()["activation_steps"] == POLICY and json.dumps(request.to_dict())
    assert online.policies(request) == dict.fromkeys(("transformer", "transformer_2"), request.activation_steps)
    mixed = online.run(request).frames
    assert not np.array_equal(mixed, plain)
    assert np.array_equal(online.run(online.request(**SMALL)).frames, plain), "it is the request's alone"

    stored = Session.open(by_step)
    assert stored.policies() == {"transformer": request.activation_steps}
    first = stored.run(stored.request(**SMALL)).frames
    assert not np.array_equal(first, plain) and not np.array_equal(first, mixed)
    own = Session.open(directory, method="mxfp4", components={"transformer": {"activation_steps": POLICY}})
    assert own.policies() == stored.policies()
    assert np.array_equal(own.run(own.request(**SMALL)).frames, first), "a config's is applied without another call"
    assert np.array_equal(stored.run(request).frames, mixed), "a request's is for both experts"
    without = stored.request(**SMALL, activation_steps={})
    assert stored.policies(without) == {} and np.array_equal(stored.run(without).frames, plain)
    assert np.array_equal(stored.run(stored.request(**SMALL)).frames, first)
    eight = Session.open(by_step, keys={"activation": "mxfp8"})
    assert eight.policies() == {} and "transformer" not in eight.policies(eight.request(**SMALL))
    assert not [record for record in caplog.records if "step_policy" in record.getMessage()]


def test_a_cancelled_run_leaves_no_policy_behind(directory):
    session, stop = Session.open(directory, method="mxfp4"), threading.Event()
    plain = session.run(session.request(**SMALL)).frames
    with pytest.raises(Cancelled):
        session.run(session.request(**SMALL, activation_steps={"bf16": [0, 1]}), lambda *_: stop.set(), stop)
    assert np.array_equal(session.run(session.request(**SMALL)).frames, plain)


def test_a_policy_that_was_put_on_a_sessions_own_pipeline_is_not_passed_over(directory):
    session = Session.open(directory, method="mxfp4")
    with (
        mxdit.step_policy(session.load(), {"mxfp8": [0]}),
        pytest.raises(ModelError, match="Put it on the pipeline that you call"),
    ):
        session.run(session.request(**SMALL))


@pytest.mark.parametrize(
    ("options", "fields", "error", "message"),
    [
        (
            {"method": "mxfp4"},
            {"steps": 5},
            InputError,
            "another number of steps.*got a request of 5 steps; expected 4",
        ),
        ({"method": "mxfp4"}, {"activation_steps": {"mxfp8": [4]}}, InputError, "got step 4, and a request of 4"),
        ({"method": "mxfp4"}, {"activation_steps": [4]}, InputError, r"no object of activations and steps; got \[4\]"),
        (
            {"method": "mxfp8"},
            {"activation_steps": {"mxfp4": [0]}},
            ConfigError,
            "'mxfp4' do not go with weights in 'mxfp8'",
        ),
        ({}, {}, InputError, "activations by step, and no transformer is quantized. Name a method"),
    ],
)
def test_a_request_that_its_policy_does_not_fit(directory, options, fields, error, message):
    with pytest.raises(error, match=message) as caught:
        Session.open(directory, **options).request(**{**SMALL, "activation_steps": POLICY, **fields})
    assert caught.value.field == "activation_steps"


def test_a_config_that_the_request_does_not_fit_is_said_before_the_weights_are_read(by_step):
    session = Session.open(by_step)
    with pytest.raises(InputError, match=r"activation_steps transformer: .*another number of steps"):
        session.request(**{**SMALL, "steps": 5})
    session.request(**{**SMALL, "steps": 5}, activation_steps={})
