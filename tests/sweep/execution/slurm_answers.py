"""What squeue, sinfo and scontrol print, recorded from Slurm 22.05.8."""

NAME = "moejax-20261128-101500-a1b2c3"

QUEUE = f"""\
1_2|{NAME}|PENDING|Resources
1_3|{NAME}|PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in \
higher priority partitions
2|moejax-20261128-101501-d4e5f6|PENDING|BeginTime
3|moejax-x|PENDING|JobHeldUser
1_0|{NAME}|RUNNING|None
"""

PREEMPTED = """\
JobId=4 ArrayJobId=1 ArrayTaskId=0 ArrayTaskThrottle=3 JobName=moejax-a1b2c3
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   PreemptEligibleTime=2026-11-28T09:11:03 PreemptTime=2026-11-28T09:11:04
   SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-28T09:11:03 Scheduler=Main
"""

SINFO = "main|infinite\nshort|10:00\nlong|7-00:00:00\n"
