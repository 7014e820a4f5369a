"""Retrieval from long prompts: four tasks made from a seed, their scores by length and depth, the comparison of several models.

Key-value retrieval and multi-document retrieval are those of "Lost in the Middle" (Liu et al. 2023), topics and lines those of LongEval
(Li et al. 2023); LightOn measured Alfred-40B-1023 with the four. The prompts have the structure of the published ones, in our own words.
"""
