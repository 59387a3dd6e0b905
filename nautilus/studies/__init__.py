"""Questions asked with everything below: what is compared, and how many trainings are carried through."""
