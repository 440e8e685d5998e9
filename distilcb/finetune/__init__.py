"""Fine-tuning on tasks and on text, with or without a teacher's soft targets."""
