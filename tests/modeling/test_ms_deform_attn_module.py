import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from m2f_video.modeling.ms_deform_attn import MSDeformAttn, initial_offsets
from m2f_video.modeling.position_encoding import pixel_centres
from m2f_video.ops import Backend
from tests.golden_files import GOLDEN, read_info
from tests.tolerances import assert_close, differences

CASES = ("c32", "c64")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def golden(case: str) -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "ops" / "msdeform_module.safetensors")
    return {name.removeprefix(f"{case}."): tensor for name, tensor in tensors.items() if name.startswith(f"{case}.")}


def module_of(case: str, golden: dict[str, Tensor], backend: Backend = "auto") -> MSDeformAttn:
    info = read_info("ops")["msdeform_module"][case]
    module = MSDeformAttn(
        dim=info["dim"], num_heads=info["heads"], num_levels=info["levels"], num_points=info["points"], backend=backend
    ).double()
    module.load_state_dict({name.removeprefix("param."): v for name, v in golden.items() if name.startswith("param.")})
    return module


def shapes_of(golden: dict[str, Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for height, width in golden["shapes"].tolist())


def references_of(golden: dict[str, Tensor]) -> Tensor:
    references = golden["reference_points_fp32"]  # (1, Q, L, 2), the same for every level
    assert torch.equal(references, references[:, :, :1].expand_as(references))
    return references[0, :, 0].double()


@pytest.mark.parametrize("backend", ["auto", "reference", "embedding_bag"])
def test_output_equals_the_original(case: str, golden: dict[str, Tensor], backend: Backend) -> None:
    module = module_of(case, golden, backend)
    with torch.no_grad():
        ours = module(golden["query"], golden["input"], references_of(golden), shapes_of(golden))
    assert_close(ours, golden["output"])


def test_gradients_equal_the_original(case: str, golden: dict[str, Tensor]) -> None:
    module = module_of(case, golden)
    query, value = golden["query"].clone().requires_grad_(), golden["input"].clone().requires_grad_()
    module(query, value, references_of(golden), shapes_of(golden)).backward(golden["grad_output"])
    ours = {f"grad.{name}": parameter.grad for name, parameter in module.named_parameters()}
    ours |= {"grad_query": query.grad, "grad_input": value.grad}
    names = [name for name in golden if name.startswith("grad") and name != "grad_output"]
    assert differences(ours, {name: golden[name] for name in names}) == {}


def test_initial_offsets_equal_the_original(case: str, golden: dict[str, Tensor]) -> None:
    info = read_info("ops")["msdeform_module"][case]
    ours = initial_offsets(info["heads"], info["levels"], info["points"])
    assert ours.shape == (info["heads"], info["levels"], info["points"], 2)
    assert_close(ours.flatten(), golden["default_sampling_offsets_bias_fp32"])


def test_reference_points_equal_the_original(golden: dict[str, Tensor]) -> None:
    ours = torch.cat([pixel_centres(height, width, dtype=torch.float32) for height, width in shapes_of(golden)])
    assert_close(ours, golden["reference_points_fp32"][0, :, 0])


def test_a_new_module_samples_a_fixed_pattern_with_equal_weights() -> None:
    module = MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=3)
    assert module.sampling_offsets.weight.eq(0).all()
    assert torch.equal(module.sampling_offsets.bias, initial_offsets(2, 1, 3).flatten())
    for parameter in module.attention_weights.parameters():
        assert parameter.eq(0).all()
    for projection in (module.value_proj, module.output_proj):
        assert projection.bias.eq(0).all()
        assert projection.weight.ne(0).all()


def test_resetting_depends_on_nothing_before() -> None:
    used, fresh = (MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=3) for _ in range(2))
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.add_(1)
    for module in (used, fresh):
        torch.manual_seed(3)
        module.reset_parameters()
    assert differences(used.state_dict(), fresh.state_dict()) == {}


def test_parameters_round_trip(case: str, golden: dict[str, Tensor]) -> None:
    state = module_of(case, golden).state_dict()
    assert {f"param.{name}" for name in state} == {name for name in golden if name.startswith("param.")}
    assert all(torch.equal(tensor, golden[f"param.{name}"]) for name, tensor in state.items())


def test_locations_keep_the_precision_of_the_reference_points() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=2).bfloat16()
    shapes = ((40, 60),)
    references = pixel_centres(40, 60, dtype=torch.float32)
    value = torch.randn(1, 2400, 8)
    exact = module.float()(torch.zeros(1, 2400, 8), value, references, shapes)
    with torch.no_grad():
        rough = module.bfloat16()(torch.zeros(1, 2400, 8).bfloat16(), value.bfloat16(), references, shapes)
    # in bfloat16 locations would be off by a quarter of a pixel here
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.03)


def inputs_of_module(batch: int = 1) -> tuple[Tensor, Tensor, Tensor, tuple[tuple[int, int], ...]]:
    query, value = torch.randn(batch, 6, 8), torch.randn(batch, 6, 8)
    return query, value, pixel_centres(2, 3, dtype=torch.float32), ((2, 3),)


def random_module() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=3)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def test_hooks_of_the_offsets_are_called_and_change_nothing_by_themselves() -> None:
    module, inputs, seen = random_module(), inputs_of_module(), []
    trained = module(*inputs).detach()
    with torch.no_grad():
        plain = module(*inputs)
        module.sampling_offsets.register_forward_hook(lambda _, args, output: seen.append(output.shape))
        hooked = module(*inputs)
    assert seen == [(1, 6, 12)]
    torch.testing.assert_close(plain, trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(hooked, trained, rtol=0, atol=1e-5)


def test_offsets_without_a_bias() -> None:
    module, inputs = random_module(), inputs_of_module()
    with torch.no_grad():
        module.sampling_offsets.bias.zero_()
        expected = module(*inputs)
        module.sampling_offsets.bias = None
        torch.testing.assert_close(module(*inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_records_operators_sees_no_values() -> None:
    module, (query, value, *others) = random_module(), inputs_of_module(batch=3)
    with torch.no_grad():
        expected = module(query, value, *others)
        each = torch.vmap(lambda query, value: module(query[None], value[None], *others)[0])(query, value)
        torch.testing.assert_close(each, expected, rtol=0, atol=1e-5)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert module(mode.from_tensor(query), mode.from_tensor(value), *others).shape == (3, 6, 8)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(dim=4, num_heads=2, num_levels=2, num_points=2).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shapes = ((2, 3), (1, 2))
    references = torch.cat([pixel_centres(*shape, dtype=torch.float64) for shape in shapes]) + 0.013  # off the kinks
    query, value = (torch.randn(1, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def attend(query: Tensor, value: Tensor) -> Tensor:
        return module(query, value, references, shapes)

    assert torch.autograd.gradcheck(attend, (query, value), fast_mode=True)


def test_values_of_another_length_are_refused() -> None:
    module = MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=2)
    with pytest.raises(ValueError, match="value has 7 tokens"):
        module(torch.zeros(1, 6, 8), torch.zeros(1, 7, 8), pixel_centres(2, 3, dtype=torch.float32), ((2, 3),))


def test_an_unknown_backend_is_refused() -> None:
    module = MSDeformAttn(dim=8, num_heads=2, num_levels=1, num_points=2, backend="cuda")
    with pytest.raises(ValueError, match="unknown deformable attention backend 'cuda'"):
        module(torch.zeros(1, 6, 8), torch.zeros(1, 6, 8), pixel_centres(2, 3, dtype=torch.float32), ((2, 3),))
