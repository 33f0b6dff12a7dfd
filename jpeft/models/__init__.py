"""Encoders and their pretrained weights."""

from jpeft.models.bert import Bert, BertConfig, Intermediates

__all__ = ["Bert", "BertConfig", "Intermediates"]
