"""Exercise 12: when the teacher leaves.

p_s is the share of rollouts that get help at step s = 0, 1, … S − 1 of a training of S steps. It
falls in a straight line from p_init at step 0 to p_min at the end of the first third of the
training, and stays there:

    x = 3·s / S, but at most 1
    p = p_init + (p_min − p_init) · x

Where p ≤ eps + 0.01 the teacher is off: p_s is 0, and the rest of the training is plain GRPO. The
student must stand on its own.

(The comparison needs some care, because 0.1 + 0.2 is not 0.3 in floating point. The check tests
p = eps + 0.01 only with numbers that floating point holds exactly.)

Fill the gap, then run this file: python exercises/12_schedule.py
"""


def guidance_fraction(step, total_steps, initial=0.1, minimum=0.01, eps=0.05):
    """step s and total_steps S: int; initial p_init, minimum p_min -> p_s, a float; 0.0 once the
    teacher is off.
    """
    raise NotImplementedError("your turn: a straight line, a floor, and the end of the help")


if __name__ == "__main__":
    from checks import main

    main(__file__)
