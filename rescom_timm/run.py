"""Runs from Python: train, then evaluate, predict, draw and push."""

from __future__ import annotations

from pathlib import Path

from rescom_timm.recipe.config import Recipe
from rescom_timm.sharing.publish import Publisher
from rescom_timm.training.trainer import Resume, train


def train_recipe(recipe: Recipe, resume: Resume = False, dry_run: bool = False) -> Path:
    """Train, evaluate, save, export and push as the recipe says; returns the run's folder. See training.trainer.train
    for the arguments and what is raised."""
    return train(recipe, resume, dry_run, Publisher())
