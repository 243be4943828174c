"""A package, so that tests import what they share: `from tests.ptq.small_net import net`."""
