"""Losses against mixed and soft labels, and the mixin that brings them to any LightningModule."""

from __future__ import annotations
