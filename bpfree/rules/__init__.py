"""One file per family of learning rules: where its teaching signal comes from."""

from .attention import NextLayerAttention
from .backprop import Backprop
from .ekdaa import EKDAA
from .falsifiers import Frozen, shuffled
from .feedback import DRTP, DirectFeedbackAlignment, FeedbackAlignment, KolenPollack, SignSymmetry
from .forward_gradient import ForwardGradient
from .leader_follower import LeaderFollower
from .pepita import PEPITA

__all__ = [
    "DRTP", "EKDAA", "PEPITA", "Backprop", "DirectFeedbackAlignment", "FeedbackAlignment",
    "ForwardGradient", "Frozen", "KolenPollack", "LeaderFollower", "NextLayerAttention",
    "SignSymmetry", "shuffled",
]  # fmt: skip
