"""`StepPolicy`: a value, its two written forms, and what it says of each step of a request."""

from __future__ import annotations

import pickle

import pytest

from mxdit.config.steps import StepPolicy
from mxdit.errors import ConfigError

POLICY = StepPolicy({"mxfp8": (39, 0, 1, 38, 1), "bf16": (20,)}, 40)


def test_it_is_normal_and_equal_by_value():
    assert POLICY.activations == {"mxfp8": (0, 1, 38, 39), "bf16": (20,)}
    again = StepPolicy.from_dict({"of": 40, "bf16": [20], "mxfp8": [0, 1, 38, 39], "mxfp4": []})
    assert again == POLICY and hash(again) == hash(POLICY) and pickle.loads(pickle.dumps(POLICY)) == POLICY
    assert StepPolicy({"mxfp8": (0, 1, 38, 39), "bf16": (20,)}) != POLICY != StepPolicy({"mxfp8": (0,)}, 40)
    assert POLICY and not StepPolicy({}) and not StepPolicy({"mxfp8": ()})


def test_every_step_of_a_request():
    at = [POLICY.activation_at(step, 40) for step in range(40)]
    assert [step for step in range(40) if at[step] == "mxfp8"] == [0, 1, 38, 39]
    assert at[20] == "bf16" and at.count(None) == 35
    free = StepPolicy({"mxfp4": (0, 3)})
    assert [free.activation_at(step, 4) for step in range(4)] == ["mxfp4", None, None, "mxfp4"]
    assert free.activation_at(3, 50) == "mxfp4"
    assert StepPolicy({}).activation_at(0, 1) is None


@pytest.mark.parametrize("steps", [20, 39, 41])
def test_another_number_of_steps_than_it_was_written_for(steps):
    message = f"another number of steps.*got a request of {steps} steps; expected 40 steps. Run 40 .*0 to {steps - 1}"
    with pytest.raises(ConfigError, match=message) as error:
        POLICY.activation_at(0, steps)
    assert error.value.field == "activation_steps"


def test_steps_that_the_request_does_not_have():
    policy = StepPolicy({"mxfp8": (0, 9)})
    policy.check(10)
    with pytest.raises(ConfigError, match=r"got step 9, and a request of 9 steps; .* Run at least 10 steps"):
        policy.check(9)
    for step in (-1, 10):
        with pytest.raises(ConfigError, match=f"has no such step; got {step}; expected 0 to 9"):
            policy.activation_at(step, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1], r"no object of activations and steps; got \[0, 1\]"),
        ({"fp8": [0]}, "unknown activation; got 'fp8'; expected one of mxfp4, mxfp8, bf16. Did you mean 'mxfp8'"),
        ({"steps": [0]}, "unknown activation; got 'steps'"),
        ({"mxfp8": 0}, "the steps of 'mxfp8' are no list of step numbers.* got 0"),
        ({"mxfp8": "0"}, "no list of step numbers"),
        ({"mxfp8": [0, -1]}, r"no list of step numbers.* got \[0, -1\]"),
        ({"mxfp8": [True]}, "no list of step numbers"),
        ({"mxfp8": [0.5]}, "no list of step numbers"),
        ({"mxfp8": [3, 4], "bf16": [4]}, "a step has two activations; got step 4 under 'mxfp8' and 'bf16'"),
        ({"mxfp8": [4], "of": 4}, "a step beyond the last; got 4; expected 0 to 3, of 4 steps"),
        ({"mxfp8": [0], "of": 0}, "of is no number of steps; got 0"),
        ({"mxfp8": [0], "of": "40"}, "of is no number of steps; got '40'"),
        ({"mxfp8": [0], "of": True}, "of is no number of steps; got True"),
        ({"of": 40}, "a number of steps, and no step"),
    ],
)
def test_it_refuses(values, message):
    with pytest.raises(ConfigError, match=f"^activation_steps: .*{message}"):
        StepPolicy.from_dict(values)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("0,1,38,39=mxfp8", StepPolicy({"mxfp8": (0, 1, 38, 39)})),
        (" 0 - 3 = mxfp8 ; 7,5=bf16; of = 8;", StepPolicy({"mxfp8": (0, 1, 2, 3), "bf16": (5, 7)}, 8)),
        ("of=40;0-1,38-39=mxfp8;20=bf16", POLICY),
        ("", StepPolicy({})),
    ],
)
def test_the_text_form(text, policy):
    assert StepPolicy.parse(text) == policy == StepPolicy.parse(str(policy))


def test_it_writes_ranges_in_one_order():
    assert str(StepPolicy({"bf16": (20,), "mxfp8": (38, 39, 0, 1)}, 40)) == str(POLICY)
    assert str(POLICY) == "0-1,38-39=mxfp8;20=bf16;of=40" and str(StepPolicy({})) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,1", "not steps and their activation; got '0,1'; expected 0-1,38"),
        ("mxfp8=0", "neither a step nor a range of steps; got 'mxfp8'"),
        ("0,=mxfp8", "neither a step nor a range of steps; got ''"),
        ("3-1=mxfp8", "neither a step nor a range of steps; got '3-1'"),
        ("-1=mxfp8", "neither a step nor a range of steps; got '-1'"),
        ("0=mxfp8;1=mxfp8", "not steps and their activation; got '1=mxfp8'"),
        ("0=mxfp8;of=x", "not steps and their activation; got 'of=x'"),
        ("0=mxfp8;of=1;of=2", "not steps and their activation; got 'of=2'"),
        ("0=w4a8", "unknown activation; got 'w4a8'"),
        ("0-3=mxfp8;2=bf16", "a step has two activations"),
    ],
)
def test_the_text_form_refuses(text, message):
    with pytest.raises(ConfigError, match=f"activation_steps: {message}"):
        StepPolicy.parse(text)
