"""transformers' ModelTesterMixin on our model: every test passes that is not in the list of what does not apply."""

import contextlib
import copy
import functools
import unittest
from fnmatch import fnmatchcase

import torch
from mixins.inapplicable import INAPPLICABLE, NEEDS
from mixins.released_tests import released_tests
from tiny import BASE, random_ids

from twotower.configuration_twotower import TwoTowerConfig
from twotower.modeling_twotower import TwoTowerForBlockDiffusion

ModelTesterMixin = released_tests("test_modeling_common").ModelTesterMixin


class WithoutWindow(TwoTowerConfig):
    """transformers gives every config that has the field a sliding window, which a TwoTower refuses."""

    def __setattr__(self, name, value):
        super().__setattr__(name, None if name == "sliding_window" else value)


class Tester:
    """What the mixin asks of a model: a small config and inputs."""

    batch_size, seq_length, is_training = 3, 9, True
    num_hidden_layers = len(BASE["hybrid_override_pattern"])
    hidden_size, num_attention_heads, vocab_size = (
        BASE[n] for n in ("hidden_size", "num_attention_heads", "vocab_size")
    )

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        return self.config_class(**BASE)

    def prepare_config_and_inputs_for_common(self):
        ids = random_ids(self.batch_size, self.seq_length)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestModel(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (TwoTowerForBlockDiffusion,)

    def setUp(self):
        self.model_tester = Tester(WithoutWindow if "eager_matches_sdpa" in self._testMethodName else TwoTowerConfig)

    @property
    def has_attentions(self):
        """No attention weights come out; where they are a part only of what a test is about, it tests the rest."""
        return self._testMethodName not in (
            "test_model_outputs_equivalence",
            "test_retain_grad_hidden_states_attentions",
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            # The same masks at every call.
            inputs |= {"labels": inputs["input_ids"].clone(), "generator": torch.Generator().manual_seed(0)}
        return inputs


def reason_for(name, reasons):
    return next((reason for pattern, reason in reasons.items() if fnmatchcase(name, pattern)), None)


def applicable(test):
    """A test that must pass; one that skips itself must be in a list."""

    @functools.wraps(test)
    def run(self):
        try:
            test(self)
        except unittest.SkipTest as skip:
            if needs := reason_for(test.__name__, NEEDS):
                raise unittest.SkipTest(f"needs {needs}") from None
            self.fail(f"skips itself ({skip}), but is not in inapplicable.py")

    run.__unittest_skip__ = False  # a skip is to be seen above
    return run


def inapplicable(test, reason):
    """A test that must not pass, or it does apply."""

    @functools.wraps(test)
    def run(self):
        self.subTest = lambda *args, **kwargs: contextlib.nullcontext()  # whose failures would be reported
        try:
            test(self)
        except (Exception, unittest.SkipTest):
            raise unittest.SkipTest(reason) from None
        self.fail("passes, but is in inapplicable.py; take it out there")

    run.__unittest_skip__ = False
    return run


TESTS = [name for name in dir(TestModel) if name.startswith("test_") and callable(getattr(TestModel, name))]
for name in TESTS:
    reason = reason_for(name, INAPPLICABLE)
    method = getattr(TestModel, name)
    setattr(TestModel, name, applicable(method) if reason is None else inapplicable(method, reason))


def test_every_entry_of_the_list_is_about_a_test():
    for pattern in (*INAPPLICABLE, *NEEDS):
        assert any(fnmatchcase(name, pattern) for name in TESTS), pattern
