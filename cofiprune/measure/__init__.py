"""What a model scores, weighs and takes."""
