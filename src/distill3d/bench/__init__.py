"""Methods under one protocol: the same prompts, seeds, scene, cameras and budget for all, resumable, with a report."""
