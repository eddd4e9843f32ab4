"""AlpacaEval 2: win rates over gpt4_1106_preview by a weighted pairwise judge, raw and length-controlled."""
