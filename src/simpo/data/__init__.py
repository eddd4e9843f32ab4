"""From files and hub datasets to tokenized comparisons. Independent of torch and of training."""
