"""Timing, counting and measuring, and the command `benchmark`."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import DeformConv2d

from m2f_video import benchmark as bench
from m2f_video.benchmark import Report, Row
from m2f_video.cli.main import main
from m2f_video.config import PixelDecoderConfig
from m2f_video.modeling.video_mask2former import VideoMask2Former

SIZE = (64, 96)


def row(**fields) -> Row:
    defaults = {"part": "backbone", "implementation": "ours", "dtype": "float32", "device": "cpu", "frames": 1}
    return Row(**defaults | fields)


def printed(report: Report, capsys) -> str:
    from m2f_video.cli.console import print_table

    for table in report.tables():
        print_table(table)
    return capsys.readouterr().out


def test_functions_take_turns_after_a_round_that_does_not_count():
    calls: list[str] = []
    rounds: list[tuple[int, int]] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = bench.measure(functions, 2, progress=lambda *done: rounds.append(done))
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}
    assert rounds == [(1, 3), (2, 3), (3, 3)]


def test_the_warm_up_is_not_timed(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    slow = iter((50, 0, 0))
    seconds = bench.measure({"f": lambda: [next(now) for _ in range(next(slow))]}, 2)
    assert seconds == {"f": (1, 1)}


def test_a_cuda_device_is_waited_for(monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    bench.measure({"f": lambda: events.append("f")}, 1, "cuda")
    assert events == ["wait", "f", "wait"] * 2


def test_quartiles_rate_and_share():
    measured = row(seconds=(5, 1, 4, 2, 3), gflop=6, ceiling=4)
    assert measured.quartiles == (2, 3, 4)
    assert (measured.rate, measured.share) == (2, 0.5)
    assert row(seconds=(7,)).quartiles == (7, 7, 7)
    assert row(seconds=(7,)).rate is None


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import comparison

    return comparison


def test_ratios_compare_the_same_part_and_dtype(comparison, capsys):
    ours = [row(seconds=(1,)), row(seconds=(4,), dtype="bfloat16"), row(part="whole model")]
    theirs = [
        row(implementation="theirs", seconds=(3,)),
        row(implementation="theirs", part="whole model", seconds=(9,)),
    ]
    report = comparison.Comparison(title="t", machine={}, ceilings={}, rows=ours + theirs, baselines=("ours",))
    ratios = [1, 1, None, 3, None]
    assert [report.ratios(each)["ours"] for each in report.rows] == ratios
    assert [each["ratio_to"]["ours"] for each in report.to_dict()["rows"]] == ratios
    assert "3.00" in printed(report, capsys)


def test_what_was_not_measured_is_said(capsys, tmp_path):
    report = Report(title="t", machine={}, ceilings={}, rows=[row(note="no device"), row(seconds=(0.25,))])
    text = printed(report, capsys)
    assert "not measured" in text
    assert "no device" in text
    assert "0.25" in text
    report.write(tmp_path / "report.json", command="made by")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["command"] == "made by"
    assert data["rows"][0] | {"seconds_per_frame": "not measured", "note": "no device"} == data["rows"][0]
    assert data["rows"][1]["seconds_per_frame"]["median"] == 0.25


def test_flops_of_products_convolutions_and_attention():
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    assert bench.count_flops(lambda: F.linear(x, weight)) == 2 * 5 * 7 * 3
    kernel, image = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 8, 8)
    assert bench.count_flops(lambda: F.conv2d(image, kernel, padding=1)) == 2 * 4 * 2 * 9 * 64
    deformable, offsets = DeformConv2d(2, 4, kernel_size=3, padding=1).requires_grad_(False), torch.zeros(1, 18, 8, 8)
    assert bench.count_flops(lambda: deformable(image, offsets)) == 2 * 4 * 2 * 9 * 64
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    attention = partial(F.scaled_dot_product_attention, query, key, key)
    assert bench.count_flops(attention) == 2 * (2 * 2 * 6 * 9 * 8)
    assert bench.count_flops(lambda: x + 1) == 0


@pytest.mark.filterwarnings("ignore:TF32")  # of switching oneDNN off
def test_flops_do_not_depend_on_the_library_that_multiplies(tiny_model):
    pixels = torch.randn(2, 3, *SIZE)
    parts = bench.stages(tiny_model, pixels)
    with torch.inference_mode():
        flops = {name: bench.count_flops(part) for name, part in parts.items()}
        with torch.backends.mkldnn.flags(enabled=False):
            assert flops == {name: bench.count_flops(part) for name, part in parts.items()}
    stages = flops["backbone"] + flops["pixel decoder"] + flops["transformer decoder"]
    assert flops["whole model"] == pytest.approx(stages, rel=1e-2)
    assert 0 < flops["deformable encoder"] < flops["pixel decoder"]


@pytest.mark.parametrize("changes", [{"kind": "fapn"}, {"num_layers": 0}])
def test_a_model_without_a_deformable_encoder_has_its_other_parts(tiny_config, changes):
    pixel_decoder = PixelDecoderConfig(hidden_dim=64, mask_dim=64, **changes)
    model = VideoMask2Former(tiny_config.replace(pixel_decoder=pixel_decoder)).eval().requires_grad_(False)
    parts = bench.stages(model, torch.randn(2, 3, *SIZE))
    assert tuple(parts) == tuple(part for part in bench.PARTS[:-1] if part != bench.DEFORMABLE_ENCODER)


def test_peak_memory_of_known_tensors():
    assert bench.peak_bytes(lambda: (torch.empty(1_000_000), torch.empty(2_000_000))) == 12_000_000

    def one_after_the_other() -> None:
        for count in (1_000_000, 3_000_000, 2_000_000):
            torch.empty(count)

    assert bench.peak_bytes(one_after_the_other) == 12_000_000
    assert bench.peak_bytes(lambda: None) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ceiling_is_a_rate_that_can_be(dtype):
    assert 0 < bench.matmul_ceiling(dtype, size=64) < 1e7


def test_the_ceiling_is_of_the_fastest_call(monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda functions, *_: dict(zip(functions, [(4, 2), (8, 3)], strict=True)))
    assert bench.matmul_ceiling(torch.float32, size=1000) == pytest.approx(1.0)


def test_the_machine_is_named(monkeypatch):
    found = bench.machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert "gpu" not in found
    monkeypatch.setattr(Path, "exists", lambda _: False)  # no /proc/cpuinfo
    assert bench.machine()["processor"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    assert bench.machine("cuda:1")["gpu"] == "a GPU at cuda:1"


def test_parts_get_the_input_that_they_have_in_the_model(tiny_model):
    pixels = torch.randn(3, 3, *SIZE)
    parts = bench.stages(tiny_model, pixels)
    assert tuple(parts) == bench.PARTS[:-1]
    with torch.inference_mode():
        expected = tiny_model(pixels[None], output_hidden=True)
        features = expected.features
        for found, level in zip(parts["backbone"](), features.backbone_maps, strict=True):
            torch.testing.assert_close(found, level)
        torch.testing.assert_close(parts["pixel decoder"]().mask_features, features.mask_features)
        torch.testing.assert_close(parts["deformable encoder"](), features.encoder_layers[-1])
        for part in ("transformer decoder", "whole model"):
            torch.testing.assert_close(parts[part]().masks_queries_logits, expected.masks_queries_logits)


def test_parts_are_measured_per_frame_and_others_noted(comparison):
    x = torch.randn(10, 10)
    product = {"backbone": lambda: x @ x, "end to end": lambda: x @ x}
    ours = comparison.Implementation(name="ours", dtype=torch.float32, parts=product)
    compiled = comparison.Implementation(
        name="compiled", dtype=torch.float32, parts={"backbone": lambda: None}, counted=product,
        missing={"end to end": "no reader"},
    )  # fmt: skip
    rows = comparison.measure_parts([ours, compiled], frames=4, repeats=3, ceilings={"float32": 1.0})
    assert [(each.part, each.implementation) for each in rows] == [
        ("backbone", "ours"), ("backbone", "compiled"), ("end to end", "ours"), ("end to end", "compiled"),
    ]  # fmt: skip
    assert [each.gflop for each in rows] == [pytest.approx(2e-6 / 4), pytest.approx(2e-6 / 4), None, None]
    assert [len(each.seconds) for each in rows] == [3, 3, 3, 0]
    assert rows[2].peak_mb == 400 / 1e6
    assert rows[3].note == "no reader"


@pytest.fixture
def prepared(monkeypatch) -> list[dict]:
    """What the model is prepared with; it is not compiled, and a small product is the ceiling, for speed."""
    calls = []
    original = VideoMask2Former.prepare_for_inference

    def prepare(self: VideoMask2Former, **options) -> VideoMask2Former:
        calls.append(options)
        return original(self, **options | {"compile": "none"})

    monkeypatch.setattr(VideoMask2Former, "prepare_for_inference", prepare)
    monkeypatch.setattr(bench, "matmul_ceiling", partial(bench.matmul_ceiling, size=64))
    return calls


def run(*arguments: object) -> int:
    return main(["benchmark", *map(str, arguments)])


SMALL = ("--height", 32, "--width", 64, "--repeats", 1, "--video-frames", 2)


def test_the_command_measures_a_checkpoint(prepared, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    file = tmp_path / "speed.json"
    options = ("--dtype", "bfloat16", "--frames", 3, "--threads", 1, "--compile", "model", "--json", file)
    assert run("--checkpoint", "native", *SMALL, *options) == 0
    assert prepared == [{"dtype": torch.bfloat16, "compile": "model"}]
    text = capsys.readouterr().out
    assert all(part in text for part in bench.PARTS)
    assert "native, 32 x 64, bfloat16" in text
    rows = {each["part"]: each for each in json.loads(file.read_text())["rows"]}
    assert list(rows) == list(bench.PARTS)
    assert rows.pop("deformable encoder")["seconds_per_frame"] == "not measured"  # compiled as one with the rest
    assert [each["frames"] for each in rows.values()] == [3, 3, 3, 3, 2]
    assert all(each["seconds_per_frame"]["median"] > 0 for each in rows.values())
    assert rows["end to end"]["peak_mb"] > 0
    assert rows["whole model"]["peak_mb"] > 0
    assert rows.pop("end to end")["gflop_per_frame"] is None
    assert all(each["gflop_per_frame"] > 0 for each in rows.values())


def test_the_command_measures_an_image_model_without_tracks(prepared, tiny_config, tmp_path, capsys):
    VideoMask2Former(tiny_config.replace(temporal="per_frame")).save_pretrained(tmp_path / "image")
    assert run("--checkpoint", tmp_path / "image", *SMALL, "--plain") == 0
    assert prepared == []
    text = capsys.readouterr().out
    assert "plain" in text
    assert "not measured" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--preset", "swin_of_the_sea"), "swin_of_the_sea"),
        (("--checkpoint", "nowhere"), "nowhere"),
        (("--checkpoint", "demo", "--preset", "demo"), "not both"),
        (("--frames", 0), "--frames"),
        (("--video-frames", 0), "--video-frames"),
        (("--repeats", 0), "--repeats"),
        (("--threads", 0), "--threads"),
        (("--height", 100), "multiples of 32"),
        (("--width", 0), "multiples of 32"),
        (("--compile", "model", "--plain"), "--compile"),
        (("--json", "/no/such/folder/speed.json"), "/no/such/folder"),
        pytest.param(
            ("--device", "cuda"), "cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, named, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure", lambda *_, **__: pytest.fail("something was measured"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("m2f-video: error: ")
    assert error.count("\n") == 1
    assert named in error
